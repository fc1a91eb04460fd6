"""Whether this worker still hears the broker: it sends itself messages and notes whether they come.

A consumer can sit on a dead connection for good, with a process that lives and a broker that works; only a
message that makes the whole way round tells. Knows nothing of what other messages are about.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)
CALL_EVERY_S = 2.0
DEAF_S = 5.0  # nothing heard for so long, though the broker took our message: others should know
LOST_S = 20.0  # and for so long: only a new process helps


class Ears:
    """Any thread may call it. `send` sends a message to this very worker; `slots` is its room for tasks."""

    def __init__(self, send: Callable[[], None], *, slots: int) -> None:
        self._send = send
        self._slots = slots
        self._lock = threading.Lock()
        self._active = 0
        self._unanswered_at: float | None = None  # when the first message was sent that did not come

    def call(self) -> None:
        """Send oneself a message. Raises what `send` raises: a broker that is away is no deafness."""
        with self._lock:
            if self._active >= self._slots:  # no message is taken now, and none is owed
                self._unanswered_at = None
                return
        try:
            self._send()
        except Exception:
            with self._lock:
                self._unanswered_at = None
            raise
        with self._lock:
            if self._unanswered_at is None and self._active < self._slots:
                self._unanswered_at = time.monotonic()

    @contextmanager
    def working(self) -> Iterator[None]:
        """Around every task: that it has come proves hearing."""
        with self._lock:
            self._active += 1
            self._unanswered_at = None
        try:
            yield
        finally:
            with self._lock:
                self._active -= 1

    @property
    def silence_s(self) -> float:
        """For how long a message of ours has been on its way."""
        with self._lock:
            return 0.0 if self._unanswered_at is None else time.monotonic() - self._unanswered_at

    @property
    def deaf(self) -> bool:
        """Messages do not come."""
        return self.silence_s > DEAF_S

"""Small things done soon by one thread, so that who asks for them never waits: in order, or not at all.

For what may be lost: what waits too long, or finds too many before it, is dropped.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from queue import Full, Queue

log = logging.getLogger(__name__)


class Errands:
    """At most `most` things wait; one older than `age_s` is not done any more."""

    def __init__(self, name: str, *, most: int = 1000, age_s: float = 10.0) -> None:
        self._name = name
        self._age_s = age_s
        self._waiting: Queue[tuple[float, Callable[[], object]]] = Queue(most)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, action: Callable[[], object]) -> bool:
        """Have it done; returns at once, with False when it is dropped."""
        self._start()
        try:
            self._waiting.put_nowait((time.monotonic(), action))
        except Full:
            return False
        return True

    def flush(self, *, timeout_s: float) -> bool:
        """Whether all that was added before is done, or dropped, within the time."""
        reached = threading.Event()
        return self.add(reached.set) and reached.wait(timeout_s)

    def _start(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()

    def _run(self) -> None:
        dropped = 0
        while True:
            added_at, action = self._waiting.get()
            if time.monotonic() - added_at > self._age_s:
                dropped += 1
                continue
            if dropped:
                log.warning("%s: %d came too late and are dropped", self._name, dropped)
                dropped = 0
            try:
                action()
            except Exception:  # this thread must outlive whatever it is sent to do
                log.exception("%s: one has failed", self._name)

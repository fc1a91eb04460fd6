"""A thread that does one thing again and again until the process stops, whatever that thing raises."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)


class Beat:
    """Calls `action` every `every_s` seconds; a failure is logged once in a row, not once a beat."""

    def __init__(self, name: str, action: Callable[[], None], *, every_s: float) -> None:
        self._action = action
        self._every_s = every_s
        self._stopped = threading.Event()
        self._failing = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin; the first call comes at once."""
        self._thread.start()

    def stop(self) -> None:
        """No further call begins; returns at once, also when one is in progress."""
        self._stopped.set()

    def join(self, *, timeout_s: float) -> None:
        """After `stop`: wait for the call in progress."""
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._action()
                self._failing = False
            except Exception:  # a database or broker that is away comes back; this thread must outlive it
                if not self._failing:
                    log.warning("%s failed, trying again", self._thread.name, exc_info=True)
                self._failing = True
            self._stopped.wait(self._every_s)

"""How long an attempt may go on by itself: the time since its lease was renewed, and a guard over it.

The guard is a thread of its own because the one that renews can hang in a connection that neither
answers nor breaks. Knows neither the database nor the trainer.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType

log = logging.getLogger(__name__)


class Lease:
    """Counts from the renewal's beginning, so that this count always ends before the database's.

    Inside its `with` block `on_unsafe` is called once, from another thread, when `safe_s` seconds have
    passed without a renewal.
    """

    def __init__(self, *, begun_at: float, safe_s: float, on_unsafe: Callable[[], object]) -> None:
        self._renewed_at = begun_at  # by time.monotonic()
        self._safe_s = safe_s
        self._on_unsafe = on_unsafe
        self._over = threading.Event()
        self._fenced = False
        self._guard = threading.Thread(target=self._watch, name="lease-guard", daemon=True)

    @property
    def age_s(self) -> float:
        """Seconds since the last renewal began."""
        return time.monotonic() - self._renewed_at

    @property
    def is_unsafe(self) -> bool:
        """Whether the trainer has to be on its way down, or was sent there by the guard."""
        return self._fenced or self.age_s > self._safe_s

    def renewed(self, *, at: float) -> None:
        """The database has agreed to a renewal that began `at` (time.monotonic())."""
        self._renewed_at = at

    def __enter__(self) -> Lease:
        self._guard.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._guard.join()

    def _watch(self) -> None:
        while not self._over.wait(max(0.01, self._safe_s - self.age_s)):
            if self.is_unsafe:
                self._fenced = True
                log.warning("the lease could not be renewed for %.1f s", self.age_s)
                self._on_unsafe()
                return

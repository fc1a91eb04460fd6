"""Where words leave the engine: who listens for which request. The only state shared between threads.

A request that is not listed here gets no more words, whatever the engine still computes for it.
"""

from __future__ import annotations

import logging
from threading import Lock

from app.core.completions import Failed, Word
from worker.serving.sequence import Emit

_log = logging.getLogger(__name__)


class Outlet:
    """Open requests and their listeners."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._emits: dict[str, Emit] = {}

    def open(self, request_id: str, emit: Emit) -> bool:
        """List a request; False if one with this id is open already (a message delivered twice)."""
        with self._lock:
            if request_id in self._emits:
                return False
            self._emits[request_id] = emit
            return True

    def close(self, request_id: str) -> None:
        """Stop listening; a word on its way at this moment may still arrive."""
        with self._lock:
            self._emits.pop(request_id, None)

    def send(self, request_id: str, words: list[Word]) -> bool:
        """Hand words over; False if nobody listens (any more), or the listener itself failed."""
        with self._lock:
            emit = self._emits.get(request_id)
        if emit is None:
            return False
        try:
            emit(words)
        except Exception:
            _log.exception("listener of request %s failed; the request is dropped", request_id)
            self.close(request_id)
            return False
        return True

    def fail(self, request_id: str, failed: Failed) -> None:
        """The last word of a request."""
        self.send(request_id, [failed])
        self.close(request_id)

    def fail_all(self, failed: Failed) -> None:
        """The last word of all open requests."""
        with self._lock:
            open_ids = list(self._emits)
        for request_id in open_ids:
            self.fail(request_id, failed)

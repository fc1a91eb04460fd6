"""What the living training workers say of themselves, remembered for a moment."""

from __future__ import annotations

import threading
import time
from typing import Any

import redis

from app.core.presence import list_present

REMEMBERED_S = 1.0
AWAY_S = 10.0  # a broker that did not answer is not asked again so soon: every question may take seconds


class TrainingWorkers:
    """What the living training workers say of themselves, remembered for a moment."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._lock = threading.Lock()
        self._present: list[dict[str, Any]] | None = None
        self._fresh_until = float("-inf")

    def list(self) -> list[dict[str, Any]] | None:
        """One entry a worker; None while nobody can tell. Never waits for another thread that asks."""
        if time.monotonic() > self._fresh_until and self._lock.acquire(blocking=False):
            try:
                self._read()
            finally:
                self._lock.release()
        return self._present

    def _read(self) -> None:
        try:
            self._present = list_present(self._client, kind="training")
            self._fresh_until = time.monotonic() + REMEMBERED_S
        except redis.RedisError:
            self._present = None
            self._fresh_until = time.monotonic() + AWAY_S

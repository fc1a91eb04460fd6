"""Which base models some live inference worker serves, remembered for a second."""

from __future__ import annotations

import asyncio
import time

import redis
from anyio import to_thread

from app.core.errors import Unavailable
from app.core.presence import list_present

REMEMBERED_S = 1.0
BROKER_AWAY = "The message broker cannot be reached at the moment. Try again in a few seconds."


class Engines:
    """Answers whether a request has anybody to go to, before it is sent."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._lock = asyncio.Lock()
        self._served: frozenset[str] = frozenset()
        self._failed: redis.RedisError | None = None
        self._read_at = float("-inf")

    async def require(self, base_model: str) -> None:
        """Raise Unavailable when no live worker serves the base model."""
        if base_model not in await self._read():
            raise Unavailable(
                f"No running worker serves {base_model} at the moment. Try again in a few seconds.",
                code="model_not_loaded",
            )

    async def _read(self) -> frozenset[str]:
        async with self._lock:  # requests that arrive together read once
            if time.monotonic() - self._read_at > REMEMBERED_S:
                self._failed = None
                try:
                    self._served = await to_thread.run_sync(self._list)
                except redis.RedisError as error:  # all who wait hear of it now, not one after the other
                    self._failed = error
                self._read_at = time.monotonic()
            if self._failed is not None:
                raise Unavailable(BROKER_AWAY) from self._failed
            return self._served

    def _list(self) -> frozenset[str]:
        about = list_present(self._client, kind="inference")
        return frozenset(name for worker in about for name in worker.get("base_models", ()))

"""Clients of Redis or Valkey that never wait for a dead server without end."""

from __future__ import annotations

from typing import Any

import redis
import redis.asyncio
from redis.backoff import NoBackoff
from redis.retry import Retry

from app.core.queue import SOCKET_OPTIONS


def make_redis(url: str, *, patience_s: float | None = None) -> redis.Redis:
    """A blocking client for threads. `patience_s`: for callers who wait, how long one try may take of two."""
    options: dict[str, Any] = dict(SOCKET_OPTIONS)
    if patience_s is not None:
        options |= {"socket_timeout": patience_s, "socket_connect_timeout": patience_s}
        options["retry"] = Retry(NoBackoff(), 1)  # a connection of the pool may have died meanwhile
    client: redis.Redis = redis.Redis.from_url(url, **options)
    return client


def make_async_redis(url: str) -> redis.asyncio.Redis:
    """A client for the event loop."""
    client: redis.asyncio.Redis = redis.asyncio.Redis.from_url(url, **SOCKET_OPTIONS)
    return client

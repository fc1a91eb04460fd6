"""Clients of Redis or Valkey that never wait for a dead server without end."""

from __future__ import annotations

import redis
import redis.asyncio

from app.core.queue import SOCKET_OPTIONS


def make_redis(url: str) -> redis.Redis:
    """A blocking client for threads."""
    client: redis.Redis = redis.Redis.from_url(url, **SOCKET_OPTIONS)
    return client


def make_async_redis(url: str) -> redis.asyncio.Redis:
    """A client for the event loop."""
    client: redis.asyncio.Redis = redis.asyncio.Redis.from_url(url, **SOCKET_OPTIONS)
    return client

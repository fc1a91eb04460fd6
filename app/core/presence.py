"""Which workers are alive, as they say themselves every few seconds. Lost with Redis, back in one beat."""

from __future__ import annotations

import json
from typing import Any

import redis

_PREFIX = "luthier:worker:"


def announce(client: redis.Redis, *, kind: str, worker: str, about: dict[str, Any], ttl_s: float) -> None:
    """Say that a worker is alive. `about` must stay small: it is read on every readiness check."""
    client.set(f"{_PREFIX}{kind}:{worker}", json.dumps(about), px=int(ttl_s * 1000))


def withdraw(client: redis.Redis, *, kind: str, worker: str) -> None:
    """Say that a worker has gone."""
    client.delete(f"{_PREFIX}{kind}:{worker}")


def list_present(client: redis.Redis, *, kind: str) -> list[dict[str, Any]]:
    """What the live workers of a kind say of themselves."""
    keys = list(client.scan_iter(f"{_PREFIX}{kind}:*", count=1000))
    values = client.mget(keys) if keys else []
    return [json.loads(value) for value in values if value is not None]

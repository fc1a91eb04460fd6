"""Which workers are alive and hear, as they say themselves. Lost with Redis, back in one beat."""

from __future__ import annotations

import json
from typing import Any

import redis

_PRESENT = "luthier:worker:"
_DEAF = "luthier:deaf:"


def announce(client: redis.Redis, *, kind: str, worker: str, about: dict[str, Any], ttl_s: float) -> None:
    """Say that a worker is alive. `about` must stay small: it is read on every readiness check."""
    pipe = client.pipeline(transaction=False)
    pipe.set(f"{_PRESENT}{kind}:{worker}", json.dumps(about), px=int(ttl_s * 1000))
    pipe.delete(f"{_DEAF}{kind}:{worker}")
    pipe.execute()


def announce_deaf(client: redis.Redis, *, kind: str, worker: str, ttl_s: float) -> None:
    """Say that a worker lives but gets no messages: it is not present, and not silently gone either."""
    pipe = client.pipeline(transaction=False)
    pipe.delete(f"{_PRESENT}{kind}:{worker}")
    pipe.set(f"{_DEAF}{kind}:{worker}", "1", px=int(ttl_s * 1000))
    pipe.execute()


def withdraw(client: redis.Redis, *, kind: str, worker: str) -> None:
    """Say that a worker has gone."""
    client.delete(f"{_PRESENT}{kind}:{worker}", f"{_DEAF}{kind}:{worker}")


def list_present(client: redis.Redis, *, kind: str) -> list[dict[str, Any]]:
    """What the live workers of a kind say of themselves."""
    keys = list(client.scan_iter(f"{_PRESENT}{kind}:*", count=1000))
    values = client.mget(keys) if keys else []
    return [json.loads(value) for value in values if value is not None]


def count_deaf(client: redis.Redis, *, kind: str) -> int:
    """How many workers of a kind live but get no messages."""
    return sum(1 for _ in client.scan_iter(f"{_DEAF}{kind}:*", count=1000))


def describe(client: redis.Redis, *, kind: str) -> str:
    """How the workers of a kind are, in a word or two that begin with `ok` while some of them can work."""
    present, deaf = len(list_present(client, kind=kind)), count_deaf(client, kind=kind)
    if deaf:
        return f"{'ok, ' if present else ''}deaf: {deaf} of {present + deaf}"
    return "ok" if present else "no worker"

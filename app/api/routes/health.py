"""/healthz: the process lives. /readyz: all it needs is there. Open to everybody, so reasons stay short."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from anyio import to_thread
from fastapi import APIRouter
from fastapi.responses import JSONResponse
from sqlalchemy import text

from app.api.context import Context
from app.api.dependencies import ContextDep
from app.core.ids import random_name
from app.core.migrate import is_current
from app.core.presence import describe

router = APIRouter(tags=["health"])
CHECK_S = 3.0  # a part that has not answered by then is not ready
WORKERS = ("control", "training", "inference")


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """Whether the process answers."""
    return {"status": "ok"}


@router.get("/readyz")
async def readyz(context: ContextDep) -> JSONResponse:
    """Whether every part is there, each in a word or two."""
    checks: dict[str, Callable[[Context], str]] = {
        "database": _database,
        "broker": _broker,
        "storage": _storage,
        **{kind: _Workers(kind) for kind in WORKERS},
    }
    results = await asyncio.gather(*(_within(check, context) for check in checks.values()))
    parts = dict(zip(checks, results, strict=True))
    ready = all(result.startswith("ok") for result in results)
    body = {"status": "ready" if ready else "not_ready", "parts": parts}
    return JSONResponse(body, status_code=200 if ready else 503)


async def _within(check: Callable[[Context], str], context: Context) -> str:
    try:
        work = to_thread.run_sync(check, context, abandon_on_cancel=True, limiter=context.health_threads)
        return await asyncio.wait_for(work, CHECK_S)
    except TimeoutError:
        return f"no answer within {CHECK_S:g} s"
    except Exception:  # whatever a driver raises: the reason is the same to the outside
        return "not reachable" if check is not _storage else "not writable"


def _database(context: Context) -> str:
    with context.engine.connect() as connection:
        connection.execute(text("SELECT 1"))
    return "ok" if is_current(context.engine) else "schema is not current: run `luthier migrate`"


def _broker(context: Context) -> str:
    return "ok" if context.redis.ping() else "not reachable"


def _storage(context: Context) -> str:
    probe = context.storage.root / "tmp" / f"ready-{random_name(8)}"
    descriptor = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    os.close(descriptor)
    probe.unlink()
    return "ok"


class _Workers:
    """Whether some worker of a kind says that it lives and hears."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, context: Context) -> str:
        return describe(context.redis, kind=self.kind)

"""Log lines: one event each, with the ids of the request or job they belong to. No secrets, no user text."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_bound: ContextVar[dict[str, str] | None] = ContextVar("luthier_log_ids", default=None)


class _Ids(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        ids = _bound.get()
        record.ids = "".join(f" {key}={value}" for key, value in ids.items()) if ids else ""
        return True


def configure(process: str, *, level: str = "INFO") -> None:
    """Send every log record of this process to stderr, one line an event."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_Ids())
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s %(levelname)s {process} %(name)s%(ids)s %(message)s")
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for noisy in ("httpx", "alembic.runtime.plugins", "celery.app.trace", "celery.worker.strategy", "kombu"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


@contextmanager
def bind(**ids: str) -> Iterator[None]:
    """Add ids to every line logged inside the block."""
    token = _bound.set({**(_bound.get() or {}), **ids})
    try:
        yield
    finally:
        _bound.reset(token)

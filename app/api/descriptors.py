"""File descriptors as a limit of this process: how many go to clients, and what happens when none is left."""

from __future__ import annotations

import asyncio
import logging
import resource
from typing import Any

log = logging.getLogger(__name__)
RESERVED = 48  # for the database's pool, the broker, and files being read and written
LOG_EVERY_S = 5.0


def most_connections() -> int:
    """How many clients may be connected, so that working for them still finds descriptors to use."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 65_536 if soft == resource.RLIM_INFINITY else max(8, soft - RESERVED)


def log_full_accepts_once(loop: asyncio.AbstractEventLoop) -> None:
    """asyncio goes on by itself when it cannot accept a client, but tells of it a thousand times a second."""
    logged_at = float("-inf")

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal logged_at
        if not context.get("message", "").startswith("socket.accept() out of system resource"):
            loop.default_exception_handler(context)
        elif loop.time() - logged_at > LOG_EVERY_S:
            logged_at = loop.time()
            log.error("no client can be accepted: %s", context.get("exception"))

    loop.set_exception_handler(handle)

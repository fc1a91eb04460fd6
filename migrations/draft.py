"""Drafts a migration: what differs between the tables and a database made by the migrations so far.

For developers (`make migration NAME='add x to y'`); the draft is read and finished by hand. Its database
is an embedded PostgreSQL that lives as long as this process.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from alembic import command
from alembic.config import Config

from app.cli.postgres import prepare_postgres, wait_for_postgres
from app.core.migrate import upgrade


def draft(message: str) -> None:
    """Write the draft of one migration into migrations/versions."""
    with tempfile.TemporaryDirectory() as folder:
        server = prepare_postgres(Path(folder) / "data", "only-for-a-draft", durable=False)
        leash = subprocess.Popen(
            server.argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/"
        )
        try:
            wait_for_postgres(server.url)
            upgrade(server.url)
            write_revision(server.url, message)
        finally:
            leash.communicate()  # closing its standard input ends the server


def write_revision(url: str, message: str) -> None:
    """Let alembic compare and write; the revision's id is its date and first words."""
    config = Config(toml_file=Path(__file__).parents[1] / "pyproject.toml")
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.attributes["url"] = url
    slug = re.sub(r"[^a-z0-9]+", "_", message.lower()).strip("_")
    command.revision(
        config, message=message, rev_id=f"{datetime.now(UTC):%Y_%m_%d}_{slug[:40]}", autogenerate=True
    )


if __name__ == "__main__":
    if len(sys.argv) != 2 or not sys.argv[1].strip():
        sys.exit("usage: make migration NAME='add x to y'")
    draft(sys.argv[1].strip())

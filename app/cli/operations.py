"""`luthier migrate` and `luthier keys`: short work on the database, done in one transaction each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table
from sqlalchemy.orm import Session

from app.cli.errors import CommandError
from app.cli.running import connected_settings
from app.core import keys
from app.core.db import make_engine, make_sessions, transaction
from app.core.migrate import upgrade
from app.core.settings import Settings


def database_settings(data_dir: Path | None) -> Settings:
    """The settings, with a database to speak to."""
    settings = connected_settings(data_dir=data_dir)
    if not settings.database_url:
        raise CommandError(
            f"No database: set LUTHIER_DATABASE_URL, or start luthier up on {settings.data_dir} "
            "(give --data-dir where it runs on another folder)."
        )
    return settings


@contextmanager
def session_of(settings: Settings) -> Iterator[Session]:
    """One transaction."""
    engine = make_engine(settings.database_url)
    try:
        with transaction(make_sessions(engine)) as session:
            yield session
    finally:
        engine.dispose()


def run_migrations(data_dir: Path | None) -> None:
    """Upgrade the schema."""
    upgrade(database_settings(data_dir).database_url)
    typer.echo("The database is up to date.")


def show_new_key(data_dir: Path | None, *, name: str, project: str | None) -> None:
    """Create a key and print its secret alone on standard output, so that scripts can take it."""
    settings = database_settings(data_dir)
    with session_of(settings) as session:
        owner = keys.ensure_project(
            session, project=project or settings.project, organization=settings.organization
        )
        row, secret = keys.create_key(session, project=owner, name=name)
        key_id = row.id
    typer.echo(f"Key {key_id}; it is shown this once:", err=True)
    typer.echo(secret)


def show_keys(data_dir: Path | None) -> None:
    """Print all keys as a table."""
    table = Table(box=None)
    for title in ("id", "name", "key", "project", "created", "state"):
        table.add_column(title, no_wrap=title == "id", overflow="fold")
    with session_of(database_settings(data_dir)) as session:
        for key in keys.list_keys(session):
            state = "active" if key.revoked_at is None else f"revoked {key.revoked_at:%Y-%m-%d %H:%M}"
            table.add_row(
                key.id, key.name, f"{key.hint}…", key.project_id, f"{key.created_at:%Y-%m-%d %H:%M}", state
            )
    Console().print(table)


def end_key(data_dir: Path | None, key_id: str) -> None:
    """Revoke a key."""
    with session_of(database_settings(data_dir)) as session:
        keys.revoke_key(session, key_id)
    typer.echo(f"{key_id} is revoked.")

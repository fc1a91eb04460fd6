"""Brings a database to the schema this code needs."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, inspect, text

import migrations


def _config(url: str) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    config.attributes["url"] = url
    return config


def upgrade(url: str) -> None:
    """Run all migrations that are missing. Two processes at once are safe: the second waits."""
    command.upgrade(_config(url), "head")


def downgrade(url: str, *, revision: str) -> None:
    """Go back to an older revision; `base` empties the database."""
    command.downgrade(_config(url), revision)


@lru_cache(maxsize=1)
def _revisions() -> tuple[str | None, frozenset[str]]:
    """The newest revision of this code, and all of them."""
    scripts = ScriptDirectory.from_config(_config(""))
    return scripts.get_current_head(), frozenset(script.revision for script in scripts.walk_revisions())


def is_current(engine: Engine) -> bool:
    """Whether the database has the schema this code was written for, or a newer one it does not know.

    Newer is fine: a deployment migrates first, and old processes run on until they are replaced.
    """
    head, known = _revisions()
    with engine.connect() as connection:
        if not inspect(connection).has_table("alembic_version"):
            return False
        present = connection.scalar(text("SELECT version_num FROM alembic_version"))
    return present is not None and (present == head or present not in known)

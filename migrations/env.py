"""Runs migrations, one process at a time, each step giving up rather than blocking a live service."""

from __future__ import annotations

from alembic import context
from sqlalchemy import create_engine, pool, text

from app.core.settings import get_settings
from app.core.tables import Base

MIGRATION_LOCK = 0x6C757468  # advisory lock: two deployments may start at once


def run() -> None:
    """Migrate the database named by the caller, or by the settings."""
    url = context.config.attributes.get("url") or get_settings().database_url
    engine = create_engine(url, poolclass=pool.NullPool)
    with engine.connect() as connection:
        context.configure(connection=connection, target_metadata=Base.metadata, compare_type=True)
        with context.begin_transaction():
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
            connection.execute(text("SET LOCAL lock_timeout = '10s'"))
            context.run_migrations()
    engine.dispose()


run()

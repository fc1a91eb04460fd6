"""Migrations on databases of their own: up, down, and to exactly what the tables say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, create_engine, inspect, make_url, text

from app.core.db import Text
from app.core.migrate import downgrade, is_current, upgrade
from app.core.tables import Base
from tests.structure.sources import ROOT

SCRIPTS = ScriptDirectory(str(ROOT / "migrations"))
# What alembic's own comparison leaves out: checks, the order of columns in an index, its WHERE.
CONSTRAINTS = """
    SELECT conrelid::regclass::text, conname::text, pg_get_constraintdef(oid)
    FROM pg_constraint
    WHERE connamespace = 'public'::regnamespace AND conrelid::regclass::text <> 'alembic_version'
"""
INDEXES = """
    SELECT tablename::text, indexname::text, indexdef
    FROM pg_indexes WHERE schemaname = 'public' AND tablename <> 'alembic_version'
"""
COLUMNS = """
    SELECT table_name::text, column_name::text,
           concat_ws(' ', data_type, character_maximum_length, is_nullable, column_default, is_identity)
    FROM information_schema.columns WHERE table_schema = 'public' AND table_name <> 'alembic_version'
"""


@pytest.fixture
def empty_engine(database_url: str) -> Iterator[Engine]:
    """A new, empty database beside the shared one."""
    yield from new_database(database_url)


@pytest.fixture
def other_engine(database_url: str) -> Iterator[Engine]:
    """One more."""
    yield from new_database(database_url)


def new_database(url: str) -> Iterator[Engine]:
    name = f"structure_{uuid4().hex[:8]}"
    server = create_engine(url, isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    engine = create_engine(make_url(url).set(database=name))
    try:
        yield engine
    finally:
        engine.dispose()
        with server.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name}"))
        server.dispose()


def url_of(engine: Engine) -> str:
    return engine.url.render_as_string(hide_password=False)


def schema_of(engine: Engine) -> set[tuple[str, ...]]:
    """All columns, constraints and indexes as PostgreSQL describes them."""
    with engine.connect() as connection:
        return {
            tuple(row) for query in (COLUMNS, CONSTRAINTS, INDEXES) for row in connection.execute(text(query))
        }


def allowed_values() -> dict[tuple[str, ...], set[str]]:
    """The one thing the tables leave to the migrations: checks that hold the values of enumerations."""
    return {
        (table.name, f"ck_{table.name}_{column.name}"): set(column.type.kind)
        for table in Base.metadata.tables.values()
        for column in table.columns
        if isinstance(column.type, Text)
    }


def test_migrations_make_exactly_what_the_tables_say(empty_engine: Engine, other_engine: Engine) -> None:
    upgrade(url_of(empty_engine))
    Base.metadata.create_all(other_engine)
    migrated, declared = schema_of(empty_engine), schema_of(other_engine)
    more = {row[:2]: set(re.findall(r"'([^']+)'", row[2])) for row in migrated - declared}
    assert more == allowed_values()
    assert sorted(declared - migrated) == []
    with empty_engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_every_migration_can_be_taken_back_and_made_again(empty_engine: Engine) -> None:
    url = url_of(empty_engine)
    schemas = []
    revisions = [script.revision for script in SCRIPTS.walk_revisions()]  # newest first
    upgrade(url)
    for older in [*revisions[1:], "base"]:
        schemas.append(schema_of(empty_engine))
        downgrade(url, revision=older)
    assert inspect(empty_engine).get_table_names() == ["alembic_version"]
    assert schema_of(empty_engine) == set()
    upgrade(url)
    assert schema_of(empty_engine) == schemas[0]


def test_upgrading_twice_changes_nothing(empty_engine: Engine) -> None:
    upgrade(url_of(empty_engine))
    before = schema_of(empty_engine)
    upgrade(url_of(empty_engine))
    assert schema_of(empty_engine) == before
    assert is_current(empty_engine)


def test_a_database_without_the_newest_migration_is_not_current(empty_engine: Engine) -> None:
    assert not is_current(empty_engine)
    upgrade(url_of(empty_engine))
    downgrade(url_of(empty_engine), revision="base")
    assert not is_current(empty_engine)


def test_migrations_follow_one_another_in_one_line() -> None:
    assert len(SCRIPTS.get_heads()) == 1
    assert len(SCRIPTS.get_bases()) == 1


def test_migrations_are_named_by_date_and_deed() -> None:
    files = [Path(script.path).name for script in SCRIPTS.walk_revisions()]
    assert [name for name in files if not re.fullmatch(r"\d{4}-\d\d-\d\d_[a-z0-9_]+\.py", name)] == []
    assert files == sorted(files, reverse=True)

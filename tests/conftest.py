"""Fixtures all tests share: one real PostgreSQL and one real Valkey per test process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session, sessionmaker

from app.core.db import make_engine, make_sessions
from app.core.migrate import upgrade
from app.core.storage import Storage
from tests.servers import postgres_server, valkey_server


@pytest.fixture(scope="session")
def database_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A migrated database, shared by the tests of one process."""
    with postgres_server(tmp_path_factory.mktemp("postgres") / "data") as url:
        upgrade(url)
        yield url


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Valkey of this test process."""
    with valkey_server(tmp_path_factory.mktemp("valkey") / "data") as url:
        yield url


@pytest.fixture(scope="session")
def engine(database_url: str) -> Iterator[Engine]:
    """One engine over the shared database."""
    engine = make_engine(database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def sessions(engine: Engine) -> Iterator[sessionmaker[Session]]:
    """Sessions over an empty database; all rows go afterwards."""
    yield make_sessions(engine)
    with engine.begin() as connection:
        tables = connection.scalars(
            text(
                "SELECT tablename FROM pg_tables"
                " WHERE schemaname = 'public' AND tablename <> 'alembic_version'"
            )
        ).all()
        connection.execute(text(f"TRUNCATE {', '.join(tables)} CASCADE"))


@pytest.fixture
def session(sessions: sessionmaker[Session]) -> Iterator[Session]:
    """One session; the test commits where its subject would."""
    with sessions() as session:
        yield session


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """Storage in a folder of the test."""
    return Storage(tmp_path / "storage")


# Quick and telling folders first. The long files of tests/e2e come before those of tests/worker and
# tests/processes, so that the second process of `make test` has work beside them to the end.
_ORDER = (
    *("structure", "core", "serving", "contract", "weights", "api", "training"),
    *("e2e", "worker", "processes"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the tests by what their folder costs; within a folder they stay as they are."""
    here = Path(__file__).parent

    def cost(item: pytest.Item) -> int:
        folder = item.path.relative_to(here).parts[0]
        return _ORDER.index(folder) if folder in _ORDER else len(_ORDER)

    items.sort(key=cost)

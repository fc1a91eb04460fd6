"""A project to act in, on the real database and broker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis
from sqlalchemy.orm import Session, sessionmaker

from app.core.redis_client import make_redis
from app.core.storage import Storage
from tests.core.installation import Installation, make_installation
from tests.core.rows import House, make_caller, make_sender


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    """A client of an emptied broker."""
    client = make_redis(redis_url)
    client.flushall()
    yield client
    client.close()


@pytest.fixture
def house(session: Session, storage: Storage, redis_url: str, client: redis.Redis) -> House:
    """A project with a key."""
    return House(session, storage, make_sender(redis_url), make_caller(session, "one"))


@pytest.fixture
def installation(house: House, sessions: sessionmaker[Session]) -> Installation:
    """That project's installation, as `fsck` sees it."""
    return make_installation(house, sessions)

"""One real API server for these tests, with small limits; an empty database and storage for each test."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest
from sqlalchemy.orm import Session, sessionmaker

from app.core.db import transaction
from app.core.settings import Settings
from app.core.storage import Storage
from app.core.tables import Project
from tests.api.servers import api_server
from tests.api.workers import InferenceWorker, inference_worker
from tests.factories import make_project

MAX_FILE_BYTES = 1_000_000
MAX_BODY_BYTES = 200_000


@dataclass(frozen=True, slots=True)
class Tenant:
    """A project, a key of it, and a client that sends the key."""

    project: Project
    secret: str
    http: httpx.Client


@pytest.fixture(scope="session")
def settings(database_url: str, redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings with limits that tests can reach."""
    return Settings(
        database_url=database_url,
        redis_url=redis_url,
        data_dir=tmp_path_factory.mktemp("data"),
        max_file_bytes=MAX_FILE_BYTES,
        max_body_bytes=MAX_BODY_BYTES,
        max_messages=50,
        max_n=4,
        max_completion_tokens=4096,
        first_word_s=5.0,
        word_gap_s=2.0,
    )


@pytest.fixture(scope="session")
def server_url(settings: Settings) -> Iterator[str]:
    """The address of the server."""
    with api_server(settings) as url:
        yield url


@pytest.fixture
def storage(settings: Settings) -> Iterator[Storage]:
    """The server's own storage, emptied afterwards."""
    storage = Storage(settings.storage_dir)
    yield storage
    for folder in storage.root.iterdir():
        for entry in folder.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


@pytest.fixture
def stranger(server_url: str) -> Iterator[httpx.Client]:
    """A client without a key."""
    with httpx.Client(base_url=server_url, timeout=30) as client:
        yield client


def _tenant(sessions: sessionmaker[Session], url: str, name: str) -> Tenant:
    with transaction(sessions) as session:
        project, secret = make_project(session, name=name)
    headers = {"authorization": f"Bearer {secret}"}
    return Tenant(project, secret, httpx.Client(base_url=url, headers=headers, timeout=30))


@pytest.fixture
def tenant(sessions: sessionmaker[Session], storage: Storage, server_url: str) -> Iterator[Tenant]:
    """Who the test is about."""
    tenant = _tenant(sessions, server_url, "default")
    with tenant.http:
        yield tenant


@pytest.fixture
def neighbour(sessions: sessionmaker[Session], storage: Storage, server_url: str) -> Iterator[Tenant]:
    """Another project on the same server."""
    tenant = _tenant(sessions, server_url, "neighbour")
    with tenant.http:
        yield tenant


@pytest.fixture(scope="module")  # two of them would share one queue
def stand_in(redis_url: str) -> Iterator[InferenceWorker]:
    """A stand-in inference worker, not yet present."""
    with inference_worker(redis_url) as worker:
        yield worker


@pytest.fixture
def worker(stand_in: InferenceWorker) -> Iterator[InferenceWorker]:
    """A stand-in inference worker that the server knows of."""
    with stand_in.present():
        yield stand_in

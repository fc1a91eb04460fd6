"""A worker's context over real servers and a tiny model, and one warm trainer for all tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy.orm import Session, sessionmaker

from app.core.settings import Settings
from tests.core.rows import make_caller
from tests.tiny import build_tiny_model
from tests.worker.desk import Desk
from worker.context import make_context
from worker.trainer import Trainer


@pytest.fixture(scope="session")
def models_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A catalogue with one tiny model."""
    folder = tmp_path_factory.mktemp("models")
    build_tiny_model(folder / "tiny")
    file = folder / "models.toml"
    file.write_text(
        f'[models.tiny]\nsource = "file://{folder}/tiny"\ncontext_length = 512\nlicence = "MIT"\n'
        f'[models.gone]\nsource = "file://{folder}/gone"\ncontext_length = 512\nlicence = "MIT"\n'
    )
    return file


@pytest.fixture(scope="session")
def trainer() -> Iterator[Trainer]:
    """One trainer whose child stays warm from test to test."""
    trainer = Trainer(grace_s=1.0, worker="test")
    yield trainer
    trainer.stop()


@pytest.fixture
def desk(
    sessions: sessionmaker[Session],
    database_url: str,
    redis_url: str,
    models_file: Path,
    tmp_path: Path,
) -> Iterator[Desk]:
    """A project, and a worker with short leases."""
    settings = Settings(
        database_url=database_url,
        redis_url=redis_url,
        data_dir=tmp_path / "data",
        models_file=models_file,
        lease_s=6.0,
        heartbeat_s=0.5,
        cancel_poll_s=0.05,
        trainer_grace_s=5.0,
        retry_pause_s=0.0,
        max_length_tokens=128,
    )
    context = dataclasses.replace(make_context(settings), sessions=sessions)
    context.redis.flushall()
    with sessions() as session:
        caller = make_caller(session, "one")
    yield Desk(context, caller)
    context.redis.close()
    context.celery.close()

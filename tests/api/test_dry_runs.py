"""Dry runs: the job as it would be, asked of a real control worker's code over the real broker."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from kombu.connection import Connection
from sqlalchemy import func, select
from sqlalchemy.orm import Session, sessionmaker

from app.api import dry_runs
from app.core import presence
from app.core.base_models import DEFAULT_BASE_MODEL
from app.core.db import transaction
from app.core.settings import Settings
from app.core.storage import Storage
from app.core.tables import IdempotencyKey, Job, JobEvent
from tests.api.conftest import Tenant
from tests.api.expecting import assert_refused
from tests.factories import make_file
from tests.worker.desk import examples
from worker import control
from worker.context import Context, make_context

PATH = "/v1/fine_tuning/jobs"


@pytest.fixture
def file_id(tenant: Tenant, sessions: sessionmaker[Session], storage: Storage) -> str:
    """A good training file of the tenant."""
    with transaction(sessions) as session:
        return make_file(session, storage, project=tenant.project, data=examples(20)).id


@pytest.fixture
def context(settings: Settings, sessions: sessionmaker[Session]) -> Iterator[Context]:
    """What a control worker holds."""
    context = dataclasses.replace(make_context(settings), sessions=sessions)
    yield context
    context.redis.close()
    context.celery.close()


@contextmanager
def control_worker(context: Context, *, answers: bool = True) -> Iterator[None]:
    """One that is present, and takes the questions of the queue while the block lasts."""
    ended = threading.Event()

    def take() -> None:
        with Connection(context.settings.redis_url) as connection:  # type: ignore[no-untyped-call]
            queue = connection.SimpleQueue("control", no_ack=True)
            while not ended.is_set():
                try:
                    message = queue.get(timeout=0.05)
                except queue.Empty:
                    continue
                if answers and message.headers["task"] == "luthier.assess_job":
                    control.assess_job(context, *message.payload[0])
            queue.close()

    presence.announce(context.redis, kind="control", worker="c", about={}, ttl_s=60)
    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=10)
        presence.withdraw(context.redis, kind="control", worker="c")


def body(file_id: str, **fields: object) -> dict[str, object]:
    return {"model": DEFAULT_BASE_MODEL, "training_file": file_id, "luthier": {"dry_run": True}} | fields


def rows(sessions: sessionmaker[Session]) -> list[int | None]:
    with sessions() as session:
        counts = (select(func.count()).select_from(table) for table in (Job, JobEvent, IdempotencyKey))
        return [session.scalar(count) for count in counts]


def test_a_dry_run_answers_with_the_job_and_makes_nothing(
    tenant: Tenant, file_id: str, context: Context, sessions: sessionmaker[Session]
) -> None:
    headers = {"idempotency-key": "one"}
    asked = body(file_id, suffix="shop", luthier={"dry_run": True, "rank": 8})
    with control_worker(context):
        job = tenant.http.post(PATH, json=asked, headers=headers).json()
    assert job["object"] == "fine_tuning.job"
    assert (job["status"], job["error"], job["user_provided_suffix"]) == ("queued", None, "shop")
    assert job["hyperparameters"] == {"n_epochs": 5, "batch_size": 1, "learning_rate_multiplier": 1.0}
    assert (job["luthier"]["dry_run"], job["luthier"]["rank"]) == (True, 8)
    assert job["luthier"]["estimate"]["steps"] == 100
    assert rows(sessions) == [0, 0, 0]
    assert tenant.http.get(f"{PATH}/{job['id']}").status_code == 404
    # The key is free for the job itself.
    created = tenant.http.post(PATH, json=body(file_id, luthier={"rank": 8}), headers=headers)
    assert created.status_code == 200
    assert "dry_run" not in created.json()["luthier"]


def test_a_file_that_would_fail_the_job_is_named_in_the_answer(
    tenant: Tenant, context: Context, sessions: sessionmaker[Session], storage: Storage
) -> None:
    with transaction(sessions) as session:
        bad = make_file(session, storage, project=tenant.project, data=examples(12) + b"{}\n").id
    with control_worker(context):
        job = tenant.http.post(PATH, json=body(bad)).json()
    assert job["status"] == "failed"
    assert job["error"]["code"] == "invalid_training_file"
    assert "Example 13" in job["error"]["message"]
    assert job["luthier"]["estimate"] is None
    assert rows(sessions) == [0, 0, 0]


def test_what_refuses_a_job_refuses_its_dry_run(tenant: Tenant, file_id: str) -> None:
    refused = tenant.http.post(PATH, json=body("file-none"))
    assert_refused(refused, 400, code="invalid_value", param="training_file")
    refused = tenant.http.post(PATH, json=body(file_id, model="none"))
    assert_refused(refused, 400, code="model_not_available", param="model")


def test_without_a_control_worker_the_answer_is_503_at_once(tenant: Tenant, file_id: str) -> None:
    answer = tenant.http.post(PATH, json=body(file_id))
    assert answer.status_code == 503
    assert "No control worker" in answer.json()["error"]["message"]
    assert "retry-after" in answer.headers


def test_a_control_worker_that_does_not_answer_is_not_waited_for_for_ever(
    tenant: Tenant, file_id: str, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry_runs, "WAIT_S", 0.5)
    with control_worker(context, answers=False):
        answer = tenant.http.post(PATH, json=body(file_id))
    assert answer.status_code == 503
    assert "create the job" in answer.json()["error"]["message"]


def test_a_question_nobody_waits_for_any_more_is_not_worked_on(
    tenant: Tenant, file_id: str, context: Context
) -> None:
    question = {
        "project_id": tenant.project.id,
        "model": DEFAULT_BASE_MODEL,
        "base_model": DEFAULT_BASE_MODEL,
        "training_file": file_id,
        "validation_file": None,
        "method": "supervised",
        "hyperparameters": {},
        "luthier": {},
        "seed": 1,
        "reply_to": "luthier:assessment:late",
        "expires_at": 1.0,
    }
    control.assess_job(context, question)
    assert context.redis.llen("luthier:assessment:late") == 0

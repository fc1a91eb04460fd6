"""Idempotency-Key: whatever a client sends again, there is one thing and one answer."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import httpx
import openai
import pytest
from sqlalchemy import func, select, text
from sqlalchemy.orm import Session, sessionmaker

from app.core.base_models import DEFAULT_BASE_MODEL
from app.core.db import transaction, utc_now
from app.core.idempotency import forget_old
from app.core.settings import Settings
from app.core.storage import Storage
from app.core.tables import File, IdempotencyKey, Job
from tests.api.conftest import Tenant
from tests.api.expecting import assert_refused, stored
from tests.factories import make_file

JOBS, FILES = "/v1/fine_tuning/jobs", "/v1/files"
DATA = b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}\n' * 12
Body = dict[str, Any]


@pytest.fixture
def body(tenant: Tenant, sessions: sessionmaker[Session], storage: Storage) -> Body:
    """A job that can be created."""
    with transaction(sessions) as session:
        file = make_file(session, storage, project=tenant.project)
    return {"model": DEFAULT_BASE_MODEL, "training_file": file.id}


def create(tenant: Tenant, body: Body, key: str | None) -> httpx.Response:
    """Create a job under a key."""
    return tenant.http.post(JOBS, json=body, headers={} if key is None else {"idempotency-key": key})


def upload(tenant: Tenant, key: str, *, data: bytes = DATA, name: str = "a", **fields: str) -> httpx.Response:
    """Upload a file under a key; httpx makes a new boundary for each."""
    return tenant.http.post(
        FILES,
        files={"file": (name, data)},
        data={"purpose": "fine-tune", **fields},
        headers={"idempotency-key": key},
    )


def count(sessions: sessionmaker[Session], table: type[Any]) -> int:
    """Rows of a table."""
    with sessions() as session:
        return session.scalar(select(func.count()).select_from(table)) or 0


def test_the_same_request_again_gets_the_same_answer_and_makes_nothing(
    tenant: Tenant, body: Body, sessions: sessionmaker[Session]
) -> None:
    first, second = create(tenant, body, "k"), create(tenant, body, "k")
    assert (first.status_code, second.status_code) == (200, 200)
    assert first.content == second.content
    assert first.headers["x-request-id"] != second.headers["x-request-id"]
    assert "idempotent-replayed" not in first.headers
    assert second.headers["idempotent-replayed"] == "true"
    assert count(sessions, Job) == 1


def test_the_answer_stays_what_it_was_though_the_job_went_on(tenant: Tenant, body: Body) -> None:
    first = create(tenant, body, "k")
    tenant.http.post(f"{JOBS}/{first.json()['id']}/cancel")
    assert create(tenant, body, "k").json()["status"] == "validating_files"


def test_without_a_key_or_with_another_each_request_makes_its_own(
    tenant: Tenant, body: Body, sessions: sessionmaker[Session]
) -> None:
    answers = [create(tenant, body, key) for key in (None, None, "k", "K", "k k")]
    assert [answer.status_code for answer in answers] == [200] * 5
    assert count(sessions, Job) == 5


def test_a_key_given_to_another_body_or_path_is_refused(
    tenant: Tenant, body: Body, sessions: sessionmaker[Session]
) -> None:
    create(tenant, body, "k")
    for answer in (
        create(tenant, body | {"seed": 1}, "k"),
        upload(tenant, "k"),
        tenant.http.post(f"{JOBS}?a=b", json=body, headers={"idempotency-key": "k"}),
    ):
        assert_refused(answer, 422, code="idempotency_key_reused", says="new key")
    assert count(sessions, Job) == 1
    assert count(sessions, File) == 1  # the training file


def test_keys_are_of_a_project(
    tenant: Tenant, neighbour: Tenant, body: Body, sessions: sessionmaker[Session], storage: Storage
) -> None:
    with transaction(sessions) as session:
        other = make_file(session, storage, project=neighbour.project)
    first = create(tenant, body, "k")
    second = create(neighbour, body | {"training_file": other.id}, "k")
    assert second.status_code == 200, second.text
    assert first.json()["id"] != second.json()["id"]


def test_fifty_at_once_make_one_job(tenant: Tenant, body: Body, sessions: sessionmaker[Session]) -> None:
    together = threading.Barrier(50)

    def send(_: int) -> httpx.Response:
        together.wait(20)
        return create(tenant, body, "k")

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(send, range(50)))
    made = {answer.json()["id"] for answer in answers if answer.status_code == 200}
    busy = [answer for answer in answers if answer.status_code != 200]
    for answer in busy:
        assert_refused(answer, 409, code="idempotency_key_in_use")
        assert answer.headers["retry-after"] == "1"
    assert len(made) == 1
    assert count(sessions, Job) == 1
    assert create(tenant, body, "k").json()["id"] in made


def test_while_the_first_is_under_way_the_second_is_told_to_come_back(
    tenant: Tenant, body: Body, sessions: sessionmaker[Session]
) -> None:
    with sessions() as session, ThreadPoolExecutor(1) as pool:
        session.execute(text("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE"))  # the first waits here
        first = pool.submit(create, tenant, body, "k")
        while not session.scalar(text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'")):
            assert not first.done()
        assert_refused(create(tenant, body, "k"), 409, code="idempotency_key_in_use")
        session.rollback()
        assert first.result(20).status_code == 200
    assert create(tenant, body, "k").json() == first.result().json()


def test_the_official_client_comes_back_by_itself_and_gets_the_job(
    tenant: Tenant, body: Body, server_url: str, sessions: sessionmaker[Session]
) -> None:
    with openai.OpenAI(api_key=tenant.secret, base_url=f"{server_url}/v1", max_retries=5) as client:

        def make(_: int) -> str:
            return client.fine_tuning.jobs.create(**body, extra_headers={"Idempotency-Key": "k"}).id

        with ThreadPoolExecutor(8) as pool:
            assert len(set(pool.map(make, range(8)))) == 1
    assert count(sessions, Job) == 1


def test_a_refused_request_leaves_its_key_free(tenant: Tenant, body: Body) -> None:
    for bad in (body | {"model": "absent"}, body | {"seed": -1}, body | {"training_file": "absent"}):
        assert create(tenant, bad, "k").status_code == 400
    assert create(tenant, body, "k").status_code == 200


def test_a_job_whose_answer_cannot_be_kept_is_not_made(
    tenant: Tenant, body: Body, sessions: sessionmaker[Session]
) -> None:
    with sessions() as session, ThreadPoolExecutor(1) as pool:
        session.execute(text("LOCK TABLE idempotency_keys IN EXCLUSIVE MODE"))  # reads pass, writes wait
        answer = pool.submit(create, tenant, body, "k")
        waiting = text("SELECT pid FROM pg_locks WHERE NOT granted")
        while (pid := session.scalar(waiting)) is None:
            assert not answer.done()
        session.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
        assert answer.result(20).status_code == 503
    assert count(sessions, Job) == 0
    assert create(tenant, body, "k").status_code == 200


def test_an_upload_sent_again_is_one_file(
    tenant: Tenant, sessions: sessionmaker[Session], storage: Storage
) -> None:
    first, second = upload(tenant, "k"), upload(tenant, "k")
    assert first.content == second.content
    assert second.headers["idempotent-replayed"] == "true"
    assert stored(storage) == [f"files/{first.json()['id']}"]
    assert count(sessions, File) == 1


@pytest.mark.parametrize(
    "other",
    [{"data": DATA + b"x"}, {"name": "b"}, {"purpose": "user_data"}],
    ids=["bytes", "name", "purpose"],
)
def test_another_upload_under_the_same_key_is_refused_and_leaves_nothing(
    tenant: Tenant, storage: Storage, other: dict[str, Any]
) -> None:
    first = upload(tenant, "k")
    assert_refused(upload(tenant, "k", **other), 422, code="idempotency_key_reused")
    assert stored(storage) == [f"files/{first.json()['id']}"]


@pytest.mark.parametrize("key", ["", "a" * 256, "ü", "a\tb"])
def test_a_key_that_is_none_is_refused(tenant: Tenant, body: Body, key: str) -> None:
    answer = tenant.http.post(JOBS, json=body, headers=[("idempotency-key", key.encode())])
    assert_refused(answer, 400, code="invalid_idempotency_key", says="1 to 255")


def test_two_keys_are_refused(tenant: Tenant, body: Body) -> None:
    answer = tenant.http.post(JOBS, json=body, headers=[("idempotency-key", "a"), ("idempotency-key", "b")])
    assert_refused(answer, 400, code="invalid_idempotency_key", says="twice")


def test_keys_are_forgotten_after_their_time_and_not_before(
    tenant: Tenant, body: Body, sessions: sessionmaker[Session], settings: Settings
) -> None:
    first = create(tenant, body, "old").json()["id"], create(tenant, body, "new").json()["id"]
    with transaction(sessions) as session:
        old = session.get_one(IdempotencyKey, (tenant.project.id, "old"))
        old.created_at = utc_now() - timedelta(hours=settings.idempotency_hours, seconds=1)
        new = session.get_one(IdempotencyKey, (tenant.project.id, "new"))
        new.created_at = utc_now() - timedelta(hours=settings.idempotency_hours - 0.1)
    with transaction(sessions) as session:
        assert forget_old(session, settings) == 1
    again = create(tenant, body, "old").json()["id"], create(tenant, body, "new").json()["id"]
    assert again[0] != first[0]
    assert again[1] == first[1]

"""Fine-tuning jobs as users make, find and cancel them."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import redis
from sqlalchemy import func, select
from sqlalchemy.orm import Session, sessionmaker

from app.core import events, files, jobs
from app.core.errors import InvalidRequest, NotFound
from app.core.jobs import NewJob
from app.core.pages import Cursor
from app.core.status import JobStatus
from app.core.storage import Storage
from app.core.tables import Job, JobEvent
from app.core.vocabulary import Purpose
from tests.core.rows import CATALOGUE, House, make_caller, make_sender


def test_a_new_job_waits_for_validation_with_its_defaults_shown(house: House) -> None:
    file = house.file()
    job = house.job(file, suffix="shop-1.0", seed=7, metadata={"a": "b"})
    assert job.status is JobStatus.VALIDATING_FILES
    assert job.id.startswith("ftjob-")
    assert (job.base_model, job.suffix, job.seed, job.user_metadata) == ("tiny", "shop-1.0", 7, {"a": "b"})
    assert job.hyperparameters == dict.fromkeys(
        ("n_epochs", "batch_size", "learning_rate_multiplier"), "auto"
    )
    assert job.luthier["adapter"] == "qlora"
    assert (job.luthier["rank"], job.luthier["alpha"]) == (16, 32)
    page = events.list_events(house.session, job_id=job.id, cursor=Cursor())
    assert [event.message for event in reversed(page.data)] == [
        f"Created fine-tuning job: {job.id}",
        f"Validating training file: {file.id}",
    ]


def test_the_hint_leaves_after_the_commit_only(house: House, client: redis.Redis) -> None:
    file = house.file()
    new = NewJob(model="tiny", training_file=file.id)
    jobs.create_job(house.session, house.sender, CATALOGUE, caller=house.caller, new=new)
    assert house.sender.flush(timeout_s=10)
    assert client.llen("control") == 0
    house.session.rollback()
    assert house.sender.flush(timeout_s=10)
    assert client.llen("control") == 0
    jobs.create_job(house.session, house.sender, CATALOGUE, caller=house.caller, new=new)
    house.session.commit()
    assert house.sender.flush(timeout_s=10)
    assert client.llen("control") == 1
    house.session.commit()
    assert house.sender.flush(timeout_s=10)
    assert client.llen("control") == 1


def test_a_job_is_created_while_the_broker_is_away(house: House) -> None:
    nowhere = dataclasses.replace(house, sender=make_sender("redis://127.0.0.1:1/0"))
    assert nowhere.job().status is JobStatus.VALIDATING_FILES


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"model": "gpt-4"}, "model", "model_not_available"),
        ({"model": "ft:tiny:acme::none"}, "model", "model_not_available"),
        ({"model": "a\0b"}, "model", "model_not_available"),
        ({"training_file": "file-none"}, "training_file", "invalid_value"),
        ({"training_file": "a\0b"}, "training_file", "invalid_value"),
        ({"validation_file": "../x"}, "validation_file", "invalid_value"),
        ({"suffix": "a/b"}, "suffix", "invalid_value"),
        ({"suffix": ""}, "suffix", "invalid_value"),
        ({"suffix": "x" * 65}, "suffix", "invalid_value"),
        ({"suffix": "a:b"}, "suffix", "invalid_value"),
        ({"suffix": "a\n"}, "suffix", "invalid_value"),
        ({"luthier": {"max_length": 513}}, "luthier.max_length", "integer_above_max_value"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(
    house: House, change: dict[str, object], param: str, code: str
) -> None:
    file = house.file()
    with pytest.raises(InvalidRequest) as caught:
        house.job(file, **change)
    house.session.rollback()
    assert (caught.value.param, caught.value.code) == (param, code)
    assert house.session.scalar(select(func.count()).select_from(Job)) == 0
    assert house.session.scalar(select(func.count()).select_from(JobEvent)) == 0


def test_a_file_of_another_purpose_is_refused_with_the_cure(house: House) -> None:
    with pytest.raises(InvalidRequest, match="Upload it with purpose 'fine-tune'"):
        house.job(house.file(purpose=Purpose.BATCH))


def test_a_foreign_file_or_job_answers_like_none(house: House) -> None:
    other = dataclasses.replace(house, caller=make_caller(house.session, "two"))
    file, job = other.file(), other.job()
    with pytest.raises(InvalidRequest) as foreign:
        house.job(file)
    with pytest.raises(InvalidRequest) as absent:
        house.job(file, training_file="file-none")
    assert foreign.value.message.replace(file.id, "ID") == absent.value.message.replace("file-none", "ID")
    project_id = house.caller.project_id
    for action in (jobs.get_job, jobs.cancel_job):
        with pytest.raises(NotFound) as caught:
            action(house.session, project_id=project_id, job_id=job.id)
        assert caught.value.message == f"Could not find fine tune: {job.id}"
    page = jobs.list_jobs(house.session, project_id=project_id, metadata=None, without=False, cursor=Cursor())
    assert page.data == []


@pytest.mark.parametrize("status", [s for s in JobStatus if s not in ("succeeded", "failed")])
def test_cancel_works_in_every_open_state_and_twice(house: House, status: JobStatus) -> None:
    job = house.job()
    job.status = status
    house.session.commit()
    for _ in range(2):
        cancelled = jobs.cancel_job(house.session, project_id=job.project_id, job_id=job.id)
        house.session.commit()
        assert cancelled.status is JobStatus.CANCELLED
    page = events.list_events(house.session, job_id=job.id, cursor=Cursor())
    said = [event.message for event in page.data].count("Fine-tuning job cancelled")
    assert said == (0 if status is JobStatus.CANCELLED else 1)


@pytest.mark.parametrize("status", [JobStatus.SUCCEEDED, JobStatus.FAILED])
def test_a_finished_job_cannot_be_cancelled(house: House, status: JobStatus) -> None:
    job = house.job()
    job.status = status
    house.session.commit()
    with pytest.raises(InvalidRequest, match=f"has already {status}") as caught:
        jobs.cancel_job(house.session, project_id=job.project_id, job_id=job.id)
    assert caught.value.code == "invalid_job_state"


def test_jobs_are_found_by_metadata(house: House) -> None:
    file = house.file()
    both = house.job(file, metadata={"team": "a", "run": "1"})
    one = house.job(file, metadata={"team": "a"})
    none = house.job(file)

    def found(metadata: dict[str, str] | None, *, without: bool = False) -> list[str]:
        page = jobs.list_jobs(
            house.session,
            project_id=house.caller.project_id,
            metadata=metadata,
            without=without,
            cursor=Cursor(),
        )
        return [job.id for job in page.data]

    assert found({"team": "a"}) == [one.id, both.id]
    assert found({"team": "a", "run": "1"}) == [both.id]
    assert found({"team": "a\0"}) == []
    assert found(None, without=True) == [none.id]
    assert found(None) == [none.id, one.id, both.id]


def test_a_file_cannot_go_while_a_job_with_it_is_being_created(
    house: House, sessions: sessionmaker[Session], storage: Storage
) -> None:
    """The deletion waits for the creation, then sees its job."""

    file = house.file()
    new = NewJob(model="tiny", training_file=file.id)
    job = jobs.create_job(house.session, house.sender, CATALOGUE, caller=house.caller, new=new)
    refused: list[str | None] = []

    def delete() -> None:
        with sessions() as session:
            try:
                files.delete_file(session, storage, project_id=house.caller.project_id, file_id=file.id)
                session.commit()
            except InvalidRequest as error:
                refused.append(error.code)

    thread = threading.Thread(target=delete)
    thread.start()
    thread.join(timeout=0.3)
    assert thread.is_alive()
    house.session.commit()
    thread.join(timeout=10)
    assert refused == ["file_in_use"]
    assert job.training_file == file.id

"""What a job will take, told before it is queued; and a job no worker has room for, told with the cure."""

from __future__ import annotations

import re
from typing import Any

import pytest

from app.core import memory, presence
from app.core.db import transaction, utc_now
from app.core.status import JobStatus
from app.core.tables import Job
from tests.worker.desk import Desk, examples
from worker import control

GB = 10**9


def announce(desk: Desk, **about: Any) -> None:
    said = {"base_models": ["tiny"], "busy": False, "device": "cpu", "number_bytes": 4} | about
    presence.announce(desk.context.redis, kind="training", worker="w", about=said, ttl_s=60)


def validated(desk: Desk, data: bytes | None = None, **new: Any) -> Job:
    job_id = desk.create(data, **new)
    control.validate_job(desk.context, job_id)
    return desk.job(job_id)


def long_examples() -> bytes:
    return examples(10).replace(b"Where is my order", b"Where is my order, please tell me" * 30)


def test_a_job_that_waits_says_what_it_will_take(desk: Desk) -> None:
    announce(desk, memory_bytes=16 * GB)
    job = validated(desk)
    assert job.status is JobStatus.QUEUED
    told = job.luthier["estimate"]
    assert told["device"] == "cpu"
    assert 0.4 * GB < told["memory_bytes"] < 0.6 * GB  # a tiny model in a trainer of usual size
    assert 10 * 20 < told["trained_tokens"] / 10 < 10 * 60
    assert told["steps"] == 100
    assert told["seconds"] is told["cost"] is None  # nothing has finished here yet
    assert job.luthier["rank"] == 2  # the rest of the object is as it was


def test_seconds_and_cost_are_learned_from_finished_jobs(desk: Desk) -> None:
    desk = desk.with_settings(price_per_gpu_hour=1.8)
    first = validated(desk)
    with transaction(desk.context.sessions) as session:
        row = session.get_one(Job, first.id)
        row.status, row.running_s, row.finished_at = JobStatus.SUCCEEDED, 200.0, utc_now()
    told = validated(desk, examples(20)).luthier["estimate"]
    assert told["seconds"] == pytest.approx(200, rel=0.1)  # twice the data, half the epochs
    assert told["cost"] == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("about", [{}, {"base_models": ["gone"], "memory_bytes": 1}, {"memory_bytes": None}])
def test_nobody_is_refused_by_a_worker_that_does_not_say_or_does_not_matter(
    desk: Desk, about: dict[str, Any]
) -> None:
    announce(desk, **about)
    assert validated(desk).status is JobStatus.QUEUED


def test_without_weights_here_there_is_no_prediction_and_no_refusal(desk: Desk) -> None:
    job = validated(desk, model="gone")
    assert job.status is JobStatus.QUEUED
    assert job.luthier["estimate"]["memory_bytes"] is None
    assert job.luthier["estimate"]["steps"] == 100


@pytest.fixture
def _small_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a tiny model's job is all Python and torch."""
    monkeypatch.setitem(memory.PROCESS_BYTES, "cpu", 0)


def refused(desk: Desk, room: int, **luthier: Any) -> dict[str, Any]:
    """The error of a job that the only worker, with so much memory, has no room for."""
    announce(desk, memory_bytes=room)
    job = validated(desk, long_examples(), luthier=luthier)
    assert job.status is JobStatus.FAILED
    assert job.error is not None
    assert job.error["code"] == "out_of_memory"
    assert desk.context.redis.llen("training") == 0
    return job.error


def need(desk: Desk, **luthier: Any) -> float:
    """Bytes the job needs with one example a pass, as its refusal says."""
    said = re.match(r"The job needs about ([0-9.]+) MB of memory", refused(desk, 1, **luthier)["message"])
    assert said is not None
    return float(said[1]) * 10**6


@pytest.mark.usefixtures("_small_process")
def test_a_job_no_worker_has_room_for_fails_with_the_setting_that_fits(desk: Desk) -> None:
    full = {"adapter": "full", "max_length": 512}
    error = refused(desk, int(0.9 * need(desk, **full)), **full)
    assert error["param"] == "luthier.adapter"
    assert "With luthier.adapter 'qlora' it needs about" in error["message"]
    assert validated(desk, long_examples(), luthier=full | {"adapter": "qlora"}).status is JobStatus.QUEUED


@pytest.mark.usefixtures("_small_process")
def test_where_only_shorter_examples_fit_their_length_is_named(desk: Desk) -> None:
    options = {"adapter": "qlora", "max_length": 512, "rank": 2}
    error = refused(desk, int(0.6 * need(desk, **options)), **options)
    assert error["param"] == "luthier.max_length"
    found = re.search(r"With luthier.max_length ([0-9]+) it needs", error["message"])
    assert found is not None
    assert int(found[1]) in (64, 128, 256)
    shorter = options | {"max_length": int(found[1])}
    assert validated(desk, long_examples(), luthier=shorter).status is JobStatus.QUEUED


@pytest.mark.usefixtures("_small_process")
def test_where_nothing_fits_another_model_is_advised(desk: Desk) -> None:
    error = refused(desk, 1, adapter="lora")
    assert error["param"] == "model"
    assert "choose a smaller base model" in error["message"]


@pytest.mark.usefixtures("_small_process")
def test_one_worker_with_room_is_enough(desk: Desk) -> None:
    announce(desk, memory_bytes=1)
    about = {"base_models": ["tiny"], "busy": True, "device": "cuda", "number_bytes": 2}
    about["memory_bytes"] = 8 * GB
    presence.announce(desk.context.redis, kind="training", worker="other", about=about, ttl_s=60)
    job = validated(desk)
    assert job.status is JobStatus.QUEUED
    assert job.luthier["estimate"]["device"] == "cuda"

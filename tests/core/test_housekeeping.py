"""Rounds of housekeeping on the real database and broker."""

from __future__ import annotations

import dataclasses
import json
import sys
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import redis
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session, sessionmaker

from app.core import attempts, events, housekeeping, jobs
from app.core.attempts import Attempt
from app.core.db import utc_now
from app.core.housekeeping import Swept, purge, sweep
from app.core.settings import Settings
from app.core.status import JobStatus
from app.core.tables import File, Job, JobEvent
from tests.core.rows import House, make_sender

LEASE_S = 0.1  # so short that attempts have renewed after the tests' server began
SETTINGS = Settings(max_attempts=3, retry_pause_s=0).model_copy(update={"lease_s": LEASE_S})
AGO = timedelta(seconds=60)


def clean(house: House) -> Swept | None:
    swept = sweep(house.session, house.storage, house.sender, SETTINGS)
    house.session.commit()
    assert house.sender.flush(timeout_s=20)
    return swept


def remove(house: House) -> int:
    removed = purge(house.session, house.storage, SETTINGS)
    house.session.commit()
    return removed


def age(house: House, **values: Any) -> None:
    house.session.execute(update(Job).values(**values))
    house.session.commit()


def hinted(client: redis.Redis, queue: str) -> list[str]:
    messages = [json.loads(raw) for raw in client.lrange(queue, 0, -1)]  # type: ignore[union-attr]
    return [message["headers"]["argsrepr"] and message["headers"]["task"] for message in messages]


def queue_up(house: House) -> Job:
    job = house.job()
    numbers = {"n_epochs": 1, "batch_size": 1, "learning_rate_multiplier": 1.0}
    attempts.finish_validation(house.session, job.id, hyperparameters=numbers)
    house.session.commit()
    return job


def claim(house: House) -> Job:
    job = attempts.claim_job(house.session, worker="w1", lease_s=30)
    house.session.commit()
    assert job is not None
    return job


def test_a_lost_hint_is_sent_again_once_it_is_old(house: House, client: redis.Redis) -> None:
    house.job()
    queue_up(house)
    client.flushall()
    assert clean(house) == Swept()
    age(house, hinted_at=utc_now() - AGO)
    assert clean(house) == Swept(hinted=2)
    assert hinted(client, "control") == ["luthier.validate_job"]
    assert hinted(client, "training") == ["luthier.run_job"]
    assert clean(house) == Swept()


def test_hints_do_not_pile_up_while_all_workers_are_busy(
    house: House, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(housekeeping, "MAX_BACKLOG", 3)
    for _ in range(5):
        queue_up(house)
    client.flushall()
    for _ in range(4):
        age(house, hinted_at=utc_now() - AGO)
        clean(house)
    assert client.llen("training") == 3


def test_a_broker_that_is_away_keeps_nothing_else_from_being_done(house: House) -> None:
    away = dataclasses.replace(house, sender=make_sender("redis://127.0.0.1:1/0"))
    queue_up(house)
    claim(house)
    age(house, lease_expires_at=func.clock_timestamp())
    assert clean(away) == Swept(requeued=1)
    age(house, hinted_at=None)
    assert clean(house) == Swept(hinted=1)


def test_a_dead_attempt_is_queued_again_its_folder_removed_and_a_worker_told(
    house: House, client: redis.Redis
) -> None:
    queue_up(house)
    job = claim(house)
    folder = house.storage.path(Attempt(job.id, 1).folder_key)
    folder.mkdir()
    (folder / "half").write_bytes(b"x")
    client.flushall()
    assert clean(house) == Swept()
    age(house, lease_expires_at=func.clock_timestamp())
    assert clean(house) == Swept(hinted=1, requeued=1)
    house.session.refresh(job)
    assert (job.status, job.deaths, job.worker) == (JobStatus.QUEUED, 1, None)
    assert client.llen("training") == 1
    assert not folder.exists()
    assert claim(house).attempt == 2


def test_a_job_that_kills_its_workers_fails_in_the_end(house: House) -> None:
    queue_up(house)
    for _ in range(3):
        job = claim(house)
        age(house, lease_expires_at=func.clock_timestamp())
        clean(house)
    house.session.refresh(job)
    assert job.status is JobStatus.FAILED
    assert job.error is not None
    assert job.error["code"] == "worker_lost"
    assert "The worker w1 that ran attempt 3 is gone" in job.error["message"]


def test_a_restart_of_the_database_costs_an_attempt_but_no_try(house: House) -> None:
    queue_up(house)
    for _ in range(SETTINGS.max_attempts + 1):
        job = claim(house)
        age(house, lease_expires_at=func.pg_postmaster_start_time())
        assert clean(house) == Swept(hinted=1, requeued=1)
        house.session.refresh(job)
        assert (job.status, job.deaths) == (JobStatus.QUEUED, 0)


def test_an_attempt_that_renewed_after_a_restart_of_the_database_died_by_itself(house: House) -> None:
    queue_up(house)
    job = claim(house)
    age(
        house,
        claimed_at=func.pg_postmaster_start_time() - AGO,
        lease_expires_at=func.pg_postmaster_start_time() + timedelta(seconds=2 * LEASE_S),
    )
    assert clean(house).requeued == 1
    house.session.refresh(job)
    assert (job.status, job.deaths) == (JobStatus.QUEUED, 1)


def test_a_dead_attempt_of_a_job_that_shall_pause_pauses_it(house: House, client: redis.Redis) -> None:
    queue_up(house)
    job = claim(house)
    jobs.pause_job(house.session, project_id=job.project_id, job_id=job.id)
    client.flushall()
    age(house, lease_expires_at=func.clock_timestamp())
    assert clean(house) == Swept(requeued=1)
    house.session.refresh(job)
    assert (job.status, job.pause_requested_at) == (JobStatus.PAUSED, None)
    assert client.llen("training") == 0


def test_a_job_that_rests_after_a_death_is_told_to_the_workers_when_it_may_start(house: House) -> None:
    job = queue_up(house)
    age(house, hinted_at=None, not_before=utc_now() + AGO)
    assert clean(house) == Swept()
    age(house, not_before=utc_now() - AGO)
    assert clean(house) == Swept(hinted=1)
    assert job.status is JobStatus.QUEUED


def test_expired_files_go_with_their_bytes(house: House) -> None:
    file = house.file(expires_after_s=3600)
    house.session.execute(update(File).values(expires_at=utc_now() - AGO))
    house.session.commit()
    assert clean(house) == Swept(expired=1)
    assert remove(house) == 1
    assert not house.storage.path(file.storage_key).exists()
    assert remove(house) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file that the kernel keeps from everybody")
def test_bytes_that_cannot_be_removed_stop_nothing_and_are_tried_again(house: House) -> None:
    stuck, other = house.file(), house.file()
    weights = house.storage.root / "weights"
    weights.rmdir()
    weights.symlink_to("/proc")
    house.session.execute(update(File).values(deleted_at=utc_now()))
    house.session.execute(update(File).where(File.id == stuck.id).values(storage_key="weights/version"))
    house.session.commit()
    assert remove(house) == 1
    assert not house.storage.path(other.storage_key).exists()
    house.session.refresh(stuck)
    assert stuck.purged_at is None


def test_one_process_at_a_time_keeps_house(house: House, sessions: sessionmaker[Session]) -> None:
    with sessions() as other:
        assert sweep(other, house.storage, house.sender, SETTINGS) is not None
        assert clean(house) is None
        other.rollback()
    assert clean(house) == Swept()


def test_who_waits_for_the_disk_keeps_nobody_from_queueing_dead_jobs(
    house: House, sessions: sessionmaker[Session]
) -> None:
    queue_up(house)
    claim(house)
    age(house, lease_expires_at=func.clock_timestamp())
    with sessions() as other:
        purge(other, house.storage, SETTINGS)
        assert remove(house) == 0  # the other one is at it
        assert clean(house) == Swept(hinted=1, requeued=1)


def test_the_clocks_of_the_machines_that_write_do_not_matter(
    house: House, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (attempts, events, housekeeping, jobs):
        monkeypatch.setattr(module, "utc_now", lambda: utc_now() + timedelta(hours=2), raising=False)
    created, resumed, swept = house.job(), queue_up(house), queue_up(house)
    for act in (jobs.pause_job, partial(jobs.resume_job, sender=house.sender)):
        act(house.session, project_id=resumed.project_id, job_id=resumed.id)
    house.session.execute(update(Job).where(Job.id == swept.id).values(hinted_at=None))
    house.session.commit()
    clean(house)
    house.session.expire_all()
    sent = [job.hinted_at for job in (created, resumed, swept)]
    assert all(at is not None and at < utc_now() + AGO for at in sent), sent
    ended = jobs.cancel_job(house.session, project_id=created.project_id, job_id=created.id)
    house.session.commit()
    told = [event.created_at for event in house.session.scalars(select(JobEvent))]
    assert max(ended.finished_at or told[0], *told) < utc_now() + AGO

"""Pause and resume as a user asks for them, in every state a job can be in."""

from __future__ import annotations

import pytest

from app.core import attempts, events, jobs
from app.core.attempts import Attempt
from app.core.errors import InvalidRequest, NotFound
from app.core.pages import Cursor
from app.core.status import JobStatus
from app.core.tables import Job
from tests.core.rows import House, make_caller

NUMBERS = {"n_epochs": 1, "batch_size": 1, "learning_rate_multiplier": 1.0}


def pause(house: House, job: Job) -> Job:
    job = jobs.pause_job(house.session, project_id=job.project_id, job_id=job.id)
    house.session.commit()
    return job


def resume(house: House, job: Job) -> Job:
    job = jobs.resume_job(house.session, house.sender, project_id=job.project_id, job_id=job.id)
    house.session.commit()
    return job


def queued(house: House) -> Job:
    job = house.job()
    attempts.finish_validation(house.session, job.id, hyperparameters=NUMBERS)
    house.session.commit()
    return job


def running(house: House) -> tuple[Job, Attempt]:
    queued(house)
    job = attempts.claim_job(house.session, worker="w1", lease_s=30)
    house.session.commit()
    assert job is not None
    return job, Attempt(job.id, job.attempt)


def words(house: House, job: Job) -> list[str]:
    page = events.list_events(house.session, job_id=job.id, cursor=Cursor(limit=50))
    return [event.message for event in reversed(page.data)]


def test_a_queued_job_pauses_at_once_and_nobody_claims_it(house: House) -> None:
    job = pause(house, queued(house))
    assert job.status is JobStatus.PAUSED
    assert attempts.claim_job(house.session, worker="w1", lease_s=30) is None
    assert resume(house, job).status is JobStatus.QUEUED
    assert attempts.claim_job(house.session, worker="w1", lease_s=30) is not None


def test_a_job_whose_files_are_read_pauses_when_they_are_good(house: House) -> None:
    job = pause(house, house.job())
    assert (job.status, job.pause_requested_at is None) == (JobStatus.VALIDATING_FILES, False)
    attempts.finish_validation(house.session, job.id, hyperparameters=NUMBERS)
    house.session.commit()
    assert (job.status, job.pause_requested_at) == (JobStatus.PAUSED, None)


def test_a_running_job_pauses_when_its_attempt_hands_it_back(house: House) -> None:
    job, attempt = running(house)
    assert not attempts.wants_pause(house.session, attempt)
    assert pause(house, job).status is JobStatus.RUNNING
    assert attempts.wants_pause(house.session, attempt)
    assert attempts.hand_back(house.session, attempt) is JobStatus.PAUSED
    house.session.commit()
    assert (job.deaths, job.pause_requested_at, job.lease_expires_at) == (0, None, None)


def test_a_pause_withdrawn_in_time_leaves_the_job_in_the_queue(house: House) -> None:
    job, attempt = running(house)
    pause(house, job)
    assert resume(house, job).status is JobStatus.RUNNING
    assert attempts.hand_back(house.session, attempt) is JobStatus.QUEUED


def test_asking_twice_changes_nothing(house: House) -> None:
    job = pause(house, queued(house))
    before = words(house, job)
    assert words(house, pause(house, job)) == before
    resume(house, job)
    before = words(house, job)
    assert words(house, resume(house, job)) == before


def test_a_paused_job_can_be_cancelled(house: House) -> None:
    job = pause(house, queued(house))
    jobs.cancel_job(house.session, project_id=job.project_id, job_id=job.id)
    assert job.status is JobStatus.CANCELLED


def test_a_finished_job_can_neither_pause_nor_resume(house: House) -> None:
    job = house.ended_job()
    for move in (pause, resume):
        with pytest.raises(InvalidRequest, match="has already cancelled; only a job that is not finished"):
            move(house, job)
        house.session.rollback()


def test_a_job_of_another_project_is_not_there(house: House) -> None:
    job = queued(house)
    other = make_caller(house.session, "two")
    with pytest.raises(NotFound):
        jobs.pause_job(house.session, project_id=other.project_id, job_id=job.id)
    with pytest.raises(NotFound):
        jobs.resume_job(house.session, house.sender, project_id=other.project_id, job_id=job.id)

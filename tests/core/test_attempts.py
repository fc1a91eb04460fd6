"""Claims, leases and what a past attempt may no longer do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import text, update
from sqlalchemy.orm import Session, sessionmaker

from app.core import attempts, events, jobs
from app.core.attempts import Attempt, AttemptLost, Death
from app.core.db import transaction, utc_now
from app.core.failures import FailureCode
from app.core.pages import Cursor
from app.core.status import JobStatus
from app.core.tables import Job
from tests.core.rows import House, make_caller

NUMBERS = {"n_epochs": 1, "batch_size": 1, "learning_rate_multiplier": 1.0}
DEATH = Death("It died.", FailureCode.WORKER_LOST)
ERROR = {"code": "x", "message": "Something was wrong", "param": None}


def queued(house: House, **new: Any) -> Job:
    job = house.job(**new)
    assert attempts.finish_validation(house.session, job.id, hyperparameters=NUMBERS) is not None
    house.session.commit()
    return job


def claim(session: Session, *, lease_s: float = 30.0) -> Job | None:
    job = attempts.claim_job(session, worker="w1", lease_s=lease_s)
    session.commit()
    return job


def running(house: House, *, lease_s: float = 30.0) -> tuple[Job, Attempt]:
    queued(house)
    job = claim(house.session, lease_s=lease_s)
    assert job is not None
    return job, Attempt(job.id, job.attempt)


def words(session: Session, job: Job) -> list[str]:
    page = events.list_events(session, job_id=job.id, cursor=Cursor(limit=50))
    return [event.message for event in reversed(page.data)]


def test_a_claim_starts_attempt_one_with_a_lease_by_the_databases_clock(house: House) -> None:
    job, attempt = running(house)
    now = house.session.scalar(text("SELECT clock_timestamp()"))
    assert (job.status, attempt.number, job.worker) == (JobStatus.RUNNING, 1, "w1")
    assert job.lease_expires_at is not None
    assert timedelta(seconds=25) < job.lease_expires_at - now <= timedelta(seconds=30)
    assert job.started_at is not None


def test_nothing_is_claimed_while_files_are_read(house: House) -> None:
    house.job()
    assert claim(house.session) is None


def test_claims_go_by_priority_then_fairness_then_age(house: House) -> None:
    other = House(house.session, house.storage, house.sender, make_caller(house.session, "two"))
    first, second = queued(house), queued(house)
    theirs = queued(other)
    urgent = queued(house, luthier={"priority": 1})
    order = [claim(house.session) for _ in range(4)]
    # After the urgent job, project one has a job running and project two has none.
    assert [job.id for job in order if job] == [urgent.id, theirs.id, first.id, second.id]
    assert claim(house.session) is None


def test_claims_at_the_same_moment_give_each_job_once(house: House, sessions: sessionmaker[Session]) -> None:
    expected = {queued(house).id for _ in range(6)}
    start, lock, claimed = threading.Barrier(6), threading.Lock(), []

    def worker() -> None:
        start.wait()
        while True:
            with transaction(sessions) as session:
                job = attempts.claim_job(session, worker="w", lease_s=30)
            if job is None:
                return
            with lock:
                claimed.append(job.id)

    threads = [threading.Thread(target=worker) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert sorted(claimed) == sorted(expected)


def test_a_claim_does_not_wait_for_one_not_yet_committed(
    house: House, sessions: sessionmaker[Session]
) -> None:
    first, second = queued(house), queued(house)
    with sessions() as one, sessions() as two:
        a = attempts.claim_job(one, worker="a", lease_s=30)
        b = attempts.claim_job(two, worker="b", lease_s=30)
        c = attempts.claim_job(two, worker="c", lease_s=30)
    assert a is not None
    assert b is not None
    assert (a.id, b.id, c) == (first.id, second.id, None)


WRITES: dict[str, Callable[[Session, Attempt], object]] = {
    "renew_lease": lambda s, a: attempts.renew_lease(s, a, lease_s=30),
    "wants_pause": attempts.wants_pause,
    "hold": attempts.hold,
    "write": lambda s, a: attempts.write(s, a, {"trained_tokens": 5}),
    "succeed": lambda s, a: attempts.succeed(s, a, values={"fine_tuned_model": "ft:x"}),
    "fail": lambda s, a: attempts.fail(s, a, error=ERROR),
    "hand_back": attempts.hand_back,
    "requeue": lambda s, a: attempts.requeue(s, a, death=DEATH, max_attempts=3),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("past", ["cancelled", "taken over", "failed", "queued again"])
def test_no_write_of_a_past_attempt_changes_anything(
    house: House, past: str, write: Callable[[Session, Attempt], object]
) -> None:
    job, attempt = running(house)
    session = house.session
    if past == "cancelled":
        jobs.cancel_job(session, project_id=job.project_id, job_id=job.id)
    elif past == "failed":
        attempts.fail(session, attempt, error=ERROR)
    else:
        attempts.requeue(session, attempt, death=DEATH, max_attempts=3)
        if past == "taken over":
            session.commit()
            assert claim(session) is not None
    session.commit()
    row = "SELECT jobs::text, (SELECT count(*) FROM job_events) FROM jobs"
    before = session.execute(text(row)).one()
    session.rollback()
    with pytest.raises(AttemptLost):
        write(session, attempt)
    session.commit()
    assert session.execute(text(row)).one() == before


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_the_present_attempt_may_write(house: House, write: Callable[[Session, Attempt], object]) -> None:
    _, attempt = running(house)
    write(house.session, attempt)
    house.session.commit()


def test_an_attempt_that_died_goes_back_until_it_died_too_often(house: House) -> None:
    queued(house)
    seen = []
    for _ in range(3):
        job = claim(house.session)
        assert job is not None
        status = attempts.requeue(
            house.session,
            Attempt(job.id, job.attempt),
            death=Death("It was shot.", FailureCode.TRAINER_DIED),
            max_attempts=3,
        )
        house.session.commit()
        seen.append((job.attempt, status))
    assert seen == [(1, JobStatus.QUEUED), (2, JobStatus.QUEUED), (3, JobStatus.FAILED)]
    fresh = jobs.get_job(house.session, project_id=house.caller.project_id, job_id=job.id)
    assert fresh.error == {
        "code": "trainer_died",
        "message": "The job failed after 3 attempts without progress. It was shot. "
        "Tell the operator: the worker's log says more.",
        "param": None,
    }
    assert fresh.finished_at is not None
    assert fresh.lease_expires_at is None
    assert words(house.session, job)[-3:] == [
        "It was shot. The job is queued again (try 2 of 3)",
        "It was shot. The job is queued again (try 3 of 3)",
        fresh.error["message"],
    ]


def test_a_dead_attempt_rests_before_its_next_try_and_longer_each_time(house: House) -> None:
    queued(house)
    rests = []
    for _ in range(2):
        job = claim(house.session)
        assert job is not None
        attempt = Attempt(job.id, job.attempt)
        attempts.requeue(house.session, attempt, death=DEATH, max_attempts=5, pause_s=60)
        house.session.commit()
        now = house.session.scalar(text("SELECT clock_timestamp()"))
        assert job.not_before is not None
        rests.append((job.not_before - now).total_seconds())
        assert claim(house.session) is None
        house.session.execute(update(Job).values(not_before=now))
    assert 55 < rests[0] <= 60
    assert 115 < rests[1] <= 120


def test_memory_of_the_host_gets_one_more_try(house: House) -> None:
    queued(house)
    death = Death("The machine ran out of memory.", FailureCode.HOST_OUT_OF_MEMORY)
    seen = []
    for _ in range(2):
        job = claim(house.session)
        assert job is not None
        seen.append(
            attempts.requeue(house.session, Attempt(job.id, job.attempt), death=death, max_attempts=3)
        )
        house.session.commit()
    assert seen == [JobStatus.QUEUED, JobStatus.FAILED]


def test_a_worker_takes_only_jobs_whose_base_model_it_has(house: House) -> None:
    job = queued(house)
    session = house.session
    assert attempts.claim_job(session, worker="w", lease_s=30, base_models=["other"]) is None
    assert attempts.claim_job(session, worker="w", lease_s=30, base_models=[]) is None
    taken = attempts.claim_job(session, worker="w", lease_s=30, base_models=["other", "tiny"])
    assert taken is not None
    assert taken.id == job.id


def test_a_claim_whose_answer_was_lost_is_handed_back_by_its_own_worker(house: House) -> None:
    job, _ = running(house)
    assert attempts.hand_back_strays(house.session, worker="another") == 0
    assert attempts.hand_back_strays(house.session, worker="w1") == 1
    house.session.commit()
    assert (job.status, job.deaths) == (JobStatus.QUEUED, 0)


def test_the_time_a_worker_was_held_adds_up_over_attempts(house: House) -> None:
    job, attempt = running(house)
    for total in (100, 200):
        house.session.execute(update(Job).values(claimed_at=utc_now() - timedelta(seconds=100)))
        attempts.hand_back(house.session, attempt)
        house.session.commit()
        assert total <= job.running_s < total + 5
        again = claim(house.session)
        assert again is not None
        attempt = Attempt(again.id, again.attempt)


def test_handing_back_costs_no_try_and_keeps_the_place(house: House) -> None:
    job, attempt = running(house)
    later = queued(house)
    for _ in range(5):
        attempts.hand_back(house.session, attempt)
        house.session.commit()
        assert (job.status, job.deaths, job.worker, job.lease_expires_at) == (JobStatus.QUEUED, 0, None, None)
        again = claim(house.session)
        assert again is not None
        assert again.id == job.id != later.id
        attempt = Attempt(again.id, again.attempt)


def test_only_leases_that_ran_out_are_dead(house: House) -> None:
    _, attempt = running(house, lease_s=30)
    assert attempts.find_dead(house.session) == []
    house.session.execute(update(Job).values(lease_expires_at=utc_now() - timedelta(seconds=1)))
    assert attempts.find_dead(house.session) == [(attempt, "w1")]
    attempts.renew_lease(house.session, attempt, lease_s=30)
    assert attempts.find_dead(house.session) == []


def test_started_at_stays_that_of_the_first_attempt(house: House) -> None:
    job, attempt = running(house)
    started = job.started_at
    attempts.hand_back(house.session, attempt)
    house.session.commit()
    again = claim(house.session)
    assert again is not None
    assert again.started_at == started


def test_validation_ends_once_whoever_says_it_second(house: House) -> None:
    job = house.job()
    assert attempts.finish_validation(house.session, job.id, hyperparameters=NUMBERS) is not None
    assert attempts.finish_validation(house.session, job.id, hyperparameters=NUMBERS) is None
    assert attempts.fail_validation(house.session, job.id, error=ERROR) is None
    house.session.commit()
    assert words(house.session, job)[-1] == "Files validated, moving job to queued state"
    assert words(house.session, job).count("Files validated, moving job to queued state") == 1


def test_a_cancelled_job_is_not_queued_by_its_validation(house: House) -> None:
    job = house.job()
    jobs.cancel_job(house.session, project_id=job.project_id, job_id=job.id)
    house.session.commit()
    assert attempts.finish_validation(house.session, job.id, hyperparameters=NUMBERS) is None
    assert attempts.fail_validation(house.session, job.id, error=ERROR) is None
    assert job.status is JobStatus.CANCELLED


def test_a_reason_with_nul_and_half_characters_is_kept(house: House) -> None:
    job = house.job()
    message = "key 'a\0b\ud800' is wrong"
    attempts.fail_validation(house.session, job.id, error={"code": "c", "message": message, "param": None})
    house.session.commit()
    house.session.expire_all()
    fresh = jobs.get_job(house.session, project_id=job.project_id, job_id=job.id)
    assert fresh.error is not None
    assert fresh.error["message"] == "key 'a\ufffdb?' is wrong"
    assert words(house.session, job)[-1] == "key 'ab' is wrong"

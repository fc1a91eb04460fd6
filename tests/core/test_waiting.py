"""What the queue tells: reasons, places and times, on real rows."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from sqlalchemy import update

from app.core import attempts
from app.core.db import utc_now
from app.core.status import JobStatus
from app.core.tables import Job
from app.core.waiting import Outlook, outlooks
from tests.core.rows import EXAMPLE, House, make_caller

NUMBERS = {"n_epochs": 1, "batch_size": 1, "learning_rate_multiplier": 1.0}
WORKER: dict[str, Any] = {"base_models": ["tiny"]}


def queued(house: House, **new: Any) -> Job:
    job = house.job(**new)
    attempts.finish_validation(house.session, job.id, hyperparameters=NUMBERS)
    house.session.commit()
    return job


def finished(house: House, *, running_s: float) -> None:
    """A job on ten examples that held a worker for so long."""
    job = queued(house)
    values = {"status": JobStatus.SUCCEEDED, "finished_at": utc_now(), "running_s": running_s}
    house.session.execute(update(Job).where(Job.id == job.id).values(values))
    house.session.commit()


def look(house: House, *jobs: Job, workers: list[dict[str, Any]] | None = None) -> list[Outlook]:
    house.session.expire_all()
    found = outlooks(house.session, jobs, workers=workers)
    return [found[job.id] for job in jobs]


def test_places_are_the_order_in_which_jobs_are_claimed(house: House) -> None:
    other = House(house.session, house.storage, house.sender, make_caller(house.session, "two"))
    mine = [queued(house) for _ in range(3)]
    theirs = [queued(other) for _ in range(2)]
    urgent = queued(house, luthier={"priority": 1})
    everybody = [*mine, *theirs, urgent]
    places = {
        job.id: seen.queue_position for job, seen in zip(everybody, look(house, *everybody), strict=True)
    }
    claimed = []
    while (job := attempts.claim_job(house.session, worker="w1", lease_s=30)) is not None:
        claimed.append(job.id)
    assert sorted(places, key=lambda id: places[id] or 0) == claimed


def test_the_reason_says_what_is_missing(house: House) -> None:
    first, second = queued(house), queued(house)
    reasons = {
        "nobody": look(house, first, workers=[])[0].queued_reason,
        "unable": look(house, first, workers=[{"base_models": ["other"]}])[0].queued_reason,
        "next": look(house, first, workers=[WORKER])[0].queued_reason,
        "unknown": look(house, first, workers=None)[0].queued_reason,
        "behind": look(house, second, workers=[WORKER])[0].queued_reason,
    }
    assert reasons == {
        "nobody": "No training worker is running; the job starts when one is back.",
        "unable": "No training worker has the weights of tiny.",
        "next": "It is next: it starts as soon as a training worker is free.",
        "unknown": "It is next: it starts as soon as a training worker is free.",
        "behind": "1 job(s) are ahead of it.",
    }
    house.session.execute(update(Job).values(not_before=utc_now() + timedelta(seconds=30)))
    [seen] = look(house, first, workers=[WORKER])
    assert seen.queued_reason is not None
    assert seen.queued_reason.startswith("Its last attempt died; the next try begins in ")


def test_a_job_that_no_worker_can_run_is_in_nobodys_way(house: House) -> None:
    stuck, free = queued(house), queued(house)
    house.session.execute(update(Job).where(Job.id == stuck.id).values(base_model="large"))
    seen = look(house, stuck, free, workers=[WORKER])
    assert [outlook.queued_reason for outlook in seen] == [
        "No training worker has the weights of large.",
        "It is next: it starts as soon as a training worker is free.",
    ]
    assert [outlook.queue_position for outlook in seen] == [1, 1]
    assert [outlook.queue_position for outlook in look(house, stuck, free, workers=[])] == [1, 2]


def test_without_a_finished_job_there_is_no_invented_time(house: House) -> None:
    first, second = queued(house), queued(house)
    seen = look(house, first, second, workers=[WORKER])
    assert [outlook.estimated_finish for outlook in seen] == [None, None]
    assert seen[1].estimated_start is None


def test_times_are_learned_from_finished_jobs_and_grow_with_the_data(house: House) -> None:
    for running_s in (90, 100, 110):
        finished(house, running_s=running_s)
    first = queued(house)
    double = queued(house, training_file=house.file(EXAMPLE * 20).id)
    now = utc_now()
    seen = look(house, first, double, workers=[WORKER])
    starts = [(outlook.estimated_start - now).total_seconds() for outlook in seen if outlook.estimated_start]
    ends = [(outlook.estimated_finish - now).total_seconds() for outlook in seen if outlook.estimated_finish]
    assert [round(x, -1) for x in starts] == [0, 100]
    assert [round(x, -1) for x in ends] == [100, 300]
    both = look(house, first, double, workers=[WORKER, WORKER])
    assert both[1].estimated_start is not None
    assert (both[1].estimated_start - now).total_seconds() < 10


def test_a_busy_worker_is_waited_for(house: House) -> None:
    finished(house, running_s=100)
    queued(house)
    assert attempts.claim_job(house.session, worker="w1", lease_s=30) is not None
    house.session.commit()
    waiting = queued(house)
    [seen] = look(house, waiting, workers=[WORKER])
    assert seen.estimated_start is not None
    assert 80 < (seen.estimated_start - utc_now()).total_seconds() <= 100


def test_jobs_that_do_not_wait_have_no_place(house: House) -> None:
    job = house.job()
    [seen] = look(house, job)
    assert seen == Outlook(queued_reason="Its files have to be checked first.")
    assert outlooks(house.session, [house.ended_job()], workers=None) == {}

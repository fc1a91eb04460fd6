"""What the queue tells those who wait: why, at which place, from when and until when. Reads, never writes.

Times are learned from this installation's own finished jobs: seconds of a worker for each byte of training
data and epoch. Where none has finished yet there is no estimate, rather than an invented one.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from statistics import median
from typing import Any

from sqlalchemy import ColumnElement, Float, and_, case, cast, func, select
from sqlalchemy.orm import Session

from app.core.db import utc_now
from app.core.status import FINAL, JobStatus
from app.core.tables import File, Job

LONGEST_QUEUE = 2000  # jobs looked at; those behind are told that they are behind so many
LEARNED_FROM = 20  # newest finished jobs


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a job that is not finished can expect; all None where nothing can be said."""

    queued_reason: str | None = None
    queue_position: int | None = None  # 1: the next one to start
    estimated_start: datetime | None = None
    estimated_finish: datetime | None = None


@dataclass(frozen=True, slots=True)
class _Waiter:
    """One job of the queue."""

    id: str
    base_model: str
    not_before: datetime | None
    duration_s: float | None


def outlooks(
    session: Session, jobs: Sequence[Job], *, workers: Sequence[Mapping[str, Any]] | None
) -> dict[str, Outlook]:
    """The outlook of each of `jobs` that is not finished, by id.

    `workers`: what the living training workers say of themselves; None: nobody knows at the moment.
    """
    open_jobs = [job for job in jobs if job.status not in FINAL]
    if not open_jobs:
        return {}
    found = {job.id: _plain_outlook(job) for job in open_jobs}
    if any(job.status is JobStatus.QUEUED for job in open_jobs):
        pace = _Pace(session)
        queue = _queue(session, pace)
        busy_until = _busy_until(session, pace)
        starts = _starts(queue, busy_until, workers)
        place = 1
        for waiter in queue:
            if waiter.id in found:
                found[waiter.id] = _outlook(waiter, place, starts.get(waiter.id), workers)
            place += _may_run(waiter, workers)  # one that no worker can run is in nobody's way
    return found


def expected_seconds(session: Session, *, base_model: str, adapter: str, work: float) -> float | None:
    """How long a job of so many bytes times epochs is likely to take; None before any has finished."""
    return _Pace(session).seconds(f"{base_model}/{adapter}", work)


def _plain_outlook(job: Job) -> Outlook:
    if job.status is JobStatus.VALIDATING_FILES:
        return Outlook("Its files have to be checked first.")
    if job.status is JobStatus.QUEUED:  # replaced below, unless it is beyond the end of what is looked at
        return Outlook(f"More than {LONGEST_QUEUE} jobs are ahead of it.")
    return Outlook(estimated_finish=job.estimated_finish)


def _outlook(
    waiter: _Waiter, place: int, start: datetime | None, workers: Sequence[Mapping[str, Any]] | None
) -> Outlook:
    finish = None
    if start is not None and waiter.duration_s is not None:
        finish = start + timedelta(seconds=waiter.duration_s)
    return Outlook(_reason(waiter, place, workers), place, start, finish)


def _reason(waiter: _Waiter, place: int, workers: Sequence[Mapping[str, Any]] | None) -> str:
    now = utc_now()
    if waiter.not_before is not None and waiter.not_before > now:
        left_s = (waiter.not_before - now).total_seconds()
        return f"Its last attempt died; the next try begins in {left_s:.0f} s."
    if workers is not None and not workers:
        return "No training worker is running; the job starts when one is back."
    if not _may_run(waiter, workers):
        return f"No training worker has the weights of {waiter.base_model}."
    if place == 1:
        return "It is next: it starts as soon as a training worker is free."
    return f"{place - 1} job(s) are ahead of it."


def _may_run(waiter: _Waiter, workers: Sequence[Mapping[str, Any]] | None) -> bool:
    """Whether some worker has what it needs; where no worker is known of, all jobs wait alike."""
    return not workers or any(_can_run(worker, waiter) for worker in workers)


def _can_run(worker: Mapping[str, Any], waiter: _Waiter) -> bool:
    models = worker.get("base_models")
    return models is None or waiter.base_model in models


def _queue(session: Session, pace: _Pace) -> list[_Waiter]:
    """Waiting jobs in the order in which they will be claimed if projects take turns from now on."""
    running = (
        select(Job.project_id, func.count().label("n"))
        .where(Job.status == JobStatus.RUNNING)
        .group_by(Job.project_id)
        .subquery()
    )
    # The k-th job of a project starts when the project has k - 1 more running than now.
    ahead_of_it = (Job.priority.desc(), Job.created_at, Job.id)
    own_turn = func.row_number().over(partition_by=Job.project_id, order_by=ahead_of_it)
    turn = own_turn + func.coalesce(running.c.n, 0)
    rows = session.execute(
        select(Job.id, Job.base_model, Job.not_before, _kind(), _work())
        .outerjoin(running, running.c.project_id == Job.project_id)
        .outerjoin(File, File.id == Job.training_file)
        .where(Job.status == JobStatus.QUEUED)
        .order_by(Job.priority.desc(), turn, Job.created_at, Job.id)
        .limit(LONGEST_QUEUE)
    )
    return [_Waiter(row[0], row[1], row[2], pace.seconds(row[3], row[4])) for row in rows]


def _busy_until(session: Session, pace: _Pace) -> list[datetime | None]:
    """When each worker that is busy now will be free; None where that cannot be told."""
    rows = session.execute(
        select(Job.estimated_finish, Job.claimed_at, _kind(), _work())
        .outerjoin(File, File.id == Job.training_file)
        .where(Job.status == JobStatus.RUNNING)
    )
    ends: list[datetime | None] = []
    for finish, claimed_at, kind, work in rows:
        duration_s = pace.seconds(kind, work)
        if finish is None and duration_s is not None and claimed_at is not None:
            finish = claimed_at + timedelta(seconds=duration_s)
        ends.append(finish)
    return ends


def _starts(
    queue: Sequence[_Waiter],
    busy_until: Sequence[datetime | None],
    workers: Sequence[Mapping[str, Any]] | None,
) -> dict[str, datetime]:
    """When each job is likely to start: each takes the worker that is free first. Ends where times do."""
    now = utc_now()
    free = [max(now, end) for end in busy_until if end is not None]
    idle = len(workers or ()) - len(busy_until)
    free += [now] * max(0, idle)
    heapq.heapify(free)
    starts: dict[str, datetime] = {}
    for waiter in queue:
        if not free or (workers is not None and not any(_can_run(worker, waiter) for worker in workers)):
            continue
        start = heapq.heappop(free)
        if waiter.not_before is not None:
            start = max(start, waiter.not_before)
        starts[waiter.id] = start
        if waiter.duration_s is not None:  # else nobody knows when that worker is free again
            heapq.heappush(free, start + timedelta(seconds=waiter.duration_s))
    return starts


class _Pace:
    """Seconds of a worker for each unit of work, learned from finished jobs of the same kind, else of any."""

    def __init__(self, session: Session) -> None:
        rows = session.execute(
            select(_kind(), Job.running_s / _work())
            .join(File, File.id == Job.training_file)
            .where(Job.status == JobStatus.SUCCEEDED, _work() > 0, Job.running_s > 0)
            .order_by(Job.finished_at.desc())
            .limit(LEARNED_FROM)
        ).all()
        self._all = median(rate for _, rate in rows) if rows else None
        kinds: dict[str, list[float]] = {}
        for kind, rate in rows:
            kinds.setdefault(kind, []).append(rate)
        self._kinds = {kind: median(rates) for kind, rates in kinds.items()}

    def seconds(self, kind: str, work: float | None) -> float | None:
        """How long a job is likely to take."""
        rate = self._kinds.get(kind, self._all)
        return None if rate is None or not work else rate * work


def _kind() -> ColumnElement[str]:
    return func.concat(Job.base_model, "/", Job.luthier["adapter"].astext)


def _work() -> ColumnElement[float]:
    """Bytes of training data times epochs; null before "auto" has become a number."""
    epochs = Job.hyperparameters["n_epochs"].astext
    is_number = and_(epochs.is_not(None), epochs != "auto")
    return cast(File.size_bytes, Float) * case((is_number, cast(epochs, Float)), else_=None)

"""What workers do to a job: claim it, keep it, write to it, end it. The only writer of leases.

Every write of an attempt holds `status = 'running' AND attempt = :mine`; one that touches no row
raises `AttemptLost`: the job was cancelled, ended or taken over, and the worker has to stop.
All moments of a lease are the database's.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, func, literal, select, update
from sqlalchemy.orm import Session, aliased

from app.core import events
from app.core.db import utc_now
from app.core.status import JobStatus, sources_of
from app.core.tables import Job
from app.core.vocabulary import EventLevel


class AttemptLost(Exception):
    """This attempt no longer owns its job."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try at one job."""

    job_id: str
    number: int

    @property
    def folder_key(self) -> str:
        """Storage key of the only folder the attempt may write to."""
        return f"attempts/{self.job_id}-{self.number}"


def claim_job(session: Session, *, worker: str, lease_s: float) -> Job | None:
    """Take the best waiting job, or None: priority first, then the project with least running, then age."""
    rival = aliased(Job)
    running = (
        select(func.count())
        .where(rival.project_id == Job.project_id, rival.status == JobStatus.RUNNING)
        .correlate(Job)
        .scalar_subquery()
    )
    best = (
        select(Job.id)
        .where(Job.status == JobStatus.QUEUED)
        .order_by(Job.priority.desc(), running, Job.created_at, Job.id)
        .limit(1)
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )
    job = session.scalar(
        update(Job)
        .where(Job.id == best, Job.status == JobStatus.QUEUED)
        .values(
            status=JobStatus.RUNNING,
            attempt=Job.attempt + 1,
            worker=worker,
            lease_expires_at=_in(lease_s),
            started_at=func.coalesce(Job.started_at, func.clock_timestamp()),
        )
        .returning(Job)
    )
    return job


def renew_lease(session: Session, attempt: Attempt, *, lease_s: float) -> None:
    """Keep the job for another while."""
    write(session, attempt, {"lease_expires_at": _in(lease_s)})


def check_alive(session: Session, attempt: Attempt) -> None:
    """Raise AttemptLost when the job is no longer this attempt's."""
    if session.scalar(select(literal(1)).where(*_mine(attempt))) is None:
        raise AttemptLost(attempt.job_id)


def hold(session: Session, attempt: Attempt) -> Job:
    """The row of a running job, locked until the commit, for writes beside it."""
    job = session.scalar(select(Job).where(*_mine(attempt)).with_for_update())
    if job is None:
        raise AttemptLost(attempt.job_id)
    return job


def write(session: Session, attempt: Attempt, values: dict[str, Any]) -> Job:
    """Change the row of a running job, and lock it until the commit."""
    job: Job | None = session.scalar(update(Job).where(*_mine(attempt)).values(**values).returning(Job))
    if job is None:
        raise AttemptLost(attempt.job_id)
    return job


def succeed(session: Session, attempt: Attempt, *, values: dict[str, Any]) -> Job:
    """End a job well."""
    return write(session, attempt, _ended(JobStatus.SUCCEEDED) | values)


def fail(session: Session, attempt: Attempt, *, error: dict[str, str | None]) -> Job:
    """End a running job with a reason the user can act on."""
    job = write(session, attempt, _ended(JobStatus.FAILED) | {"error": error})
    events.add_message(session, job, str(error["message"]), level=EventLevel.ERROR)
    return job


def hand_back(session: Session, attempt: Attempt, *, reason: str = "The worker was stopped") -> None:
    """Return a job that its worker cannot go on with; it waits in its old place and has lost no try."""
    job = write(session, attempt, _WAITING)
    events.add_message(session, job, f"{reason}; the job is queued again")


@dataclass(frozen=True, slots=True)
class Death:
    """Why an attempt ended by the machine's fault: a code of docs/api.md and a sentence for the user."""

    reason: str
    code: str = "worker_lost"


def requeue(session: Session, attempt: Attempt, *, death: Death, max_attempts: int) -> JobStatus:
    """Put a job whose attempt died back into the queue, or fail it after too many deaths."""
    job = write(session, attempt, {"deaths": Job.deaths + 1})
    if job.deaths >= max_attempts:
        message = f"The job failed after {job.deaths} attempts. {death.reason}"
        fail(session, attempt, error={"code": death.code, "message": message, "param": None})
        return JobStatus.FAILED
    write(session, attempt, _WAITING)
    again = f"{death.reason} The job is queued again (attempt {job.deaths} of {max_attempts})"
    events.add_message(session, job, again, level=EventLevel.WARN)
    return JobStatus.QUEUED


def find_dead(session: Session, *, limit: int = 50) -> list[tuple[Attempt, str | None]]:
    """Attempts whose lease has run out, with the worker that held them; rows are locked until the commit."""
    rows = session.execute(
        select(Job.id, Job.attempt, Job.worker)
        .where(Job.status == JobStatus.RUNNING, Job.lease_expires_at < func.clock_timestamp())
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    return [(Attempt(row.id, row.attempt), row.worker) for row in rows]


def finish_validation(session: Session, job_id: str, *, hyperparameters: dict[str, Any]) -> Job | None:
    """Move a job whose files are good into the queue; None when it is no longer being validated."""
    values = {"hyperparameters": hyperparameters, "status": JobStatus.QUEUED, "hinted_at": utc_now()}
    job = _move(session, job_id, JobStatus.QUEUED, source=JobStatus.VALIDATING_FILES, values=values)
    if job is not None:
        events.add_message(session, job, "Files validated, moving job to queued state")
    return job


def fail_validation(session: Session, job_id: str, *, error: dict[str, str | None]) -> Job | None:
    """Fail a job whose files are bad; None when it is no longer being validated."""
    values = _ended(JobStatus.FAILED) | {"error": error}
    job = _move(session, job_id, JobStatus.FAILED, source=JobStatus.VALIDATING_FILES, values=values)
    if job is not None:
        events.add_message(session, job, str(error["message"]), level=EventLevel.ERROR)
    return job


_WAITING: dict[str, Any] = {
    "status": JobStatus.QUEUED,
    "worker": None,
    "lease_expires_at": None,
    "estimated_finish": None,
    "hinted_at": None,
}


def _move(
    session: Session, job_id: str, target: JobStatus, *, source: JobStatus, values: dict[str, Any]
) -> Job | None:
    assert source in sources_of(target)
    return session.scalar(
        update(Job).where(Job.id == job_id, Job.status == source).values(**values).returning(Job)
    )


def _ended(status: JobStatus) -> dict[str, Any]:
    return {"status": status, "finished_at": utc_now(), "lease_expires_at": None, "estimated_finish": None}


def _mine(attempt: Attempt) -> tuple[ColumnElement[bool], ...]:
    return (
        Job.id == attempt.job_id,
        Job.status == JobStatus.RUNNING,
        Job.attempt == attempt.number,
    )


def _in(seconds: float) -> ColumnElement[datetime]:
    return func.clock_timestamp() + literal(timedelta(seconds=seconds))

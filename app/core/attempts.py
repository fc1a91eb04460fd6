"""What workers do to a job: claim it, keep it, write to it, end it. The only writer of leases.

Every write of an attempt holds `status = 'running' AND attempt = :mine`; one that touches no row
raises `AttemptLost`: the job was cancelled, ended or taken over, and the worker has to stop.
All moments of a lease are the database's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, case, cast, func, literal, or_, select, update
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session, aliased

from app.core import events
from app.core.failures import CURES, FailureCode, most_deaths
from app.core.status import JobStatus
from app.core.tables import Job
from app.core.vocabulary import EventLevel

_FOLDER = re.compile(r"(?P<job>ftjob-[A-Za-z0-9]+)-(?P<attempt>[0-9]+)(-[0-9]+)?")
STOPPED = "The worker was stopped"


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

    @classmethod
    def of_folder(cls, name: str) -> Attempt | None:
        """Whose a folder in storage is, by its name `{job}-{attempt}[-{step}]`; None: nobody's."""
        found = _FOLDER.fullmatch(name)
        return None if found is None else cls(found["job"], int(found["attempt"]))


def claim_job(
    session: Session, *, worker: str, lease_s: float, base_models: Sequence[str] | None = None
) -> Job | None:
    """Take the best waiting job, or None: priority first, then the project with least running, then age.

    `base_models`: the only ones this worker has weights of; None: any.
    """
    rival = aliased(Job)
    running = (
        select(func.count())
        .where(rival.project_id == Job.project_id, rival.status == JobStatus.RUNNING)
        .correlate(Job)
        .scalar_subquery()
    )
    able = literal(True) if base_models is None else Job.base_model.in_(base_models)
    rested = or_(Job.not_before.is_(None), Job.not_before <= func.clock_timestamp())
    best = (
        select(Job.id)
        .where(Job.status == JobStatus.QUEUED, able, rested)
        .order_by(Job.priority.desc(), running, Job.created_at, Job.id)
        .limit(1)
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )
    values = {
        "status": JobStatus.RUNNING,
        "attempt": Job.attempt + 1,
        "worker": worker,
        "lease_expires_at": in_seconds(lease_s),
        "claimed_at": func.clock_timestamp(),
        "not_before": None,
        "started_at": func.coalesce(Job.started_at, func.clock_timestamp()),
    }
    claim = update(Job).where(Job.id == best, Job.status == JobStatus.QUEUED).values(values).returning(Job)
    return session.scalar(claim)


def renew_lease(session: Session, attempt: Attempt, *, lease_s: float) -> None:
    """Keep the job for another while."""
    write(session, attempt, {"lease_expires_at": in_seconds(lease_s)})


def wants_pause(session: Session, attempt: Attempt) -> bool:
    """Whether the user has asked for a pause; raises AttemptLost when the job is no longer this attempt's."""
    row = session.execute(select(Job.pause_requested_at).where(*_mine(attempt))).one_or_none()
    if row is None:
        raise AttemptLost(attempt.job_id)
    return row.pause_requested_at is not None


def hold(session: Session, attempt: Attempt) -> Job:
    """The row of a running job, locked until the commit, for writes beside it."""
    job = session.scalar(select(Job).where(*_mine(attempt)).with_for_update())
    if job is None:
        raise AttemptLost(attempt.job_id)
    return job


def write(session: Session, attempt: Attempt, values: dict[str, Any]) -> Job:
    """Change the row of a running job, and lock it until the commit."""
    job = _update(session, _mine(attempt), values)
    if job is None:
        raise AttemptLost(attempt.job_id)
    return job


def succeed(session: Session, attempt: Attempt, *, values: dict[str, Any]) -> Job:
    """End a job well."""
    return write(session, attempt, ended(JobStatus.SUCCEEDED) | values)


def fail(session: Session, attempt: Attempt, *, error: dict[str, str | None]) -> Job:
    """End a running job with a reason the user can act on."""
    job = write(session, attempt, ended(JobStatus.FAILED) | {"error": error})
    events.add_message(session, job, str(error["message"]), level=EventLevel.ERROR)
    return job


def hand_back(session: Session, attempt: Attempt, *, reason: str = STOPPED) -> JobStatus:
    """Return a job whose attempt ends early by no fault: paused where the user asked for that, else queued.

    It waits in its old place and has lost no try.
    """
    job = write(session, attempt, _waiting())
    if job.status is JobStatus.PAUSED:
        events.add_message(session, job, "The job is paused; resume it when it shall go on")
    else:
        events.add_message(session, job, f"{reason}; the job is queued again")
    return job.status


def hand_back_strays(session: Session, *, worker: str) -> int:
    """Return jobs claimed for this idle worker that it never heard of: the answer to the commit was lost."""
    mine = (Job.status == JobStatus.RUNNING, Job.worker == worker)
    rows = session.execute(select(Job.id, Job.attempt).where(*mine).with_for_update()).all()
    for row in rows:
        reason = "The worker lost touch with the database"
        hand_back(session, Attempt(row.id, row.attempt), reason=reason)
    return len(rows)


@dataclass(frozen=True, slots=True)
class Death:
    """Why an attempt ended by the machine's fault: a sentence for the user, and its code."""

    reason: str
    code: FailureCode


def requeue(
    session: Session, attempt: Attempt, *, death: Death, max_attempts: int, pause_s: float = 0.0
) -> JobStatus:
    """Put a job whose attempt died back into the queue, or fail it after too many deaths without progress.

    The pause before the next try begins at `pause_s` and doubles with each death.
    """
    job = write(session, attempt, {"deaths": Job.deaths + 1})
    most = min(max_attempts, most_deaths(death.code))
    if job.deaths >= most:
        tries = f"{job.deaths} attempts without progress" if job.deaths > 1 else "one attempt"
        message = f"The job failed after {tries}. {death.reason} {CURES[death.code]}"
        fail(session, attempt, error={"code": death.code, "message": message, "param": None})
        return JobStatus.FAILED
    rest_s = pause_s * 2 ** (job.deaths - 1)
    tries = f"try {job.deaths + 1} of {most}"
    job = write(session, attempt, _waiting() | {"not_before": in_seconds(rest_s)})
    where = "paused, as asked" if job.status is JobStatus.PAUSED else f"queued again ({tries})"
    events.add_message(session, job, f"{death.reason} The job is {where}", level=EventLevel.WARN)
    return job.status


def find_dead(session: Session, *, limit: int = 50) -> list[tuple[Attempt, str | None]]:
    """Attempts whose lease has run out, with the worker that held them; rows are locked until the commit."""
    rows = session.execute(
        select(Job.id, Job.attempt, Job.worker)
        .where(Job.status == JobStatus.RUNNING, Job.lease_expires_at < func.clock_timestamp())
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    return [(Attempt(row.id, row.attempt), row.worker) for row in rows]


def finish_validation(
    session: Session, job_id: str, *, hyperparameters: dict[str, Any], estimate: dict[str, Any] | None = None
) -> Job | None:
    """Move a job whose files are good into the queue; None when it is no longer being validated."""
    values = {
        "hyperparameters": hyperparameters,
        "luthier": Job.luthier.op("||")(cast({"estimate": estimate}, JSONB)),
        "hinted_at": func.clock_timestamp(),
    }
    job = _validated(session, job_id, values | _queued_or_paused())
    if job is not None:
        state = "paused, as asked" if job.status is JobStatus.PAUSED else "queued"
        events.add_message(session, job, f"Files validated, moving job to {state} state")
    return job


def fail_validation(session: Session, job_id: str, *, error: dict[str, str | None]) -> Job | None:
    """Fail a job whose files are bad; None when it is no longer being validated."""
    job = _validated(session, job_id, ended(JobStatus.FAILED) | {"error": error})
    if job is not None:
        events.add_message(session, job, str(error["message"]), level=EventLevel.ERROR)
    return job


def stay_fresh(session: Session, job_id: str) -> None:
    """Say that somebody is at it, so that its hint is not sent again yet."""
    session.execute(update(Job).where(Job.id == job_id).values(hinted_at=func.clock_timestamp()))


def ended(status: JobStatus) -> dict[str, Any]:
    """What the row of a job in a final state holds, whoever ended it."""
    return _let_go() | {
        "status": status,
        "finished_at": func.clock_timestamp(),
        "not_before": None,
        "pause_requested_at": None,
    }


def in_seconds(seconds: float) -> ColumnElement[datetime]:
    """A moment from now, by the database's clock."""
    return func.clock_timestamp() + literal(timedelta(seconds=seconds))


def _waiting() -> dict[str, Any]:
    return _let_go() | _queued_or_paused() | {"worker": None, "hinted_at": None}


def _let_go() -> dict[str, Any]:
    """No attempt holds the job any more; how long one did is kept."""
    held = func.extract("epoch", func.clock_timestamp() - Job.claimed_at)
    return {
        "lease_expires_at": None,
        "estimated_finish": None,
        "running_s": Job.running_s + func.coalesce(held, 0.0),
        "claimed_at": None,
    }


def _queued_or_paused() -> dict[str, Any]:
    """Decided by the row itself, so that a pause asked for this moment is not overlooked."""
    asked = Job.pause_requested_at.is_not(None)
    status = case((asked, str(JobStatus.PAUSED)), else_=str(JobStatus.QUEUED))
    return {"status": status, "pause_requested_at": None}


def _validated(session: Session, job_id: str, values: dict[str, Any]) -> Job | None:
    return _update(session, (Job.id == job_id, Job.status == JobStatus.VALIDATING_FILES), values)


def _update(session: Session, where: tuple[ColumnElement[bool], ...], values: dict[str, Any]) -> Job | None:
    """The changed row as it is now, also where the session knew an older state of it."""
    change = update(Job).where(*where).values(values).returning(Job)
    return session.scalar(change, execution_options={"populate_existing": True})


def _mine(attempt: Attempt) -> tuple[ColumnElement[bool], ...]:
    return (
        Job.id == attempt.job_id,
        Job.status == JobStatus.RUNNING,
        Job.attempt == attempt.number,
    )

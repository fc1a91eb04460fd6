"""I2, I4, I9, I12: what the row of a job may hold in each state, and that nobody waits unnoticed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from sqlalchemy import Row, func, select, update
from sqlalchemy.orm import Session

from app.core.failures import FailureCode
from app.core.fsck.finding import BUG, HOUSEKEEPING, Finding, Severity, Site
from app.core.housekeeping import HINT_AGE_S, MAX_BACKLOG
from app.core.status import FINAL, JobStatus
from app.core.tables import Job, JobEvent

_S = JobStatus
_HELD = (_S.RUNNING,)
_PAUSABLE = (_S.VALIDATING_FILES, _S.RUNNING)
_WAITING = (_S.VALIDATING_FILES, _S.QUEUED)
_AT_WORK = {
    _S.VALIDATING_FILES: "jobs whose files are being read",
    _S.QUEUED: "jobs that wait",
    _S.RUNNING: "jobs that run",
}


def check_states(site: Site) -> Iterator[Finding]:
    """I2: a final job is ended in every column, no other is in any. A lease belongs to a running job."""
    with site.snapshot() as session:
        for job in session.execute(select(*Job.__table__.columns)).yield_per(1000):
            for problem in _ended_by_halves(job):
                yield Finding("I2", job.id, f"{job.status}, but {problem}", BUG)
            yield from _held_by_halves(job)


def check_outcomes(site: Site) -> Iterator[Finding]:
    """I9 and I12: tokens are counted exactly where a job succeeded, and every failure explains itself."""
    columns = (Job.id, Job.status, Job.error, Job.trained_tokens)
    with site.snapshot() as session:
        for job in session.execute(select(*columns)).yield_per(1000):
            if (job.status is _S.SUCCEEDED) != bool(job.trained_tokens):
                yield Finding("I9", job.id, f"{job.status} with trained_tokens {job.trained_tokens}", BUG)
            problem = _unexplained(job.error) if job.status is _S.FAILED else None
            if problem is not None:
                yield Finding("I12", job.id, problem, BUG)


def check_waiting(site: Site) -> Iterator[Finding]:
    """I4: who runs has a living lease, who waits has a fresh hint, or rests for a stated while."""
    now = func.clock_timestamp()
    # One that was just handed back, or has rested until now, is told with the next round of housekeeping.
    newest = select(func.max(JobEvent.created_at)).where(JobEvent.job_id == Job.id).scalar_subquery()
    told = func.greatest(func.coalesce(Job.hinted_at, newest, Job.created_at), Job.not_before)
    columns = (
        Job.id,
        Job.status,
        func.extract("epoch", now - Job.lease_expires_at).label("overdue_s"),
        func.extract("epoch", now - told).label("unheard_s"),
    )
    with site.snapshot() as session:
        jobs = session.execute(select(*columns).where(Job.status.not_in(FINAL))).all()
    at_work = Counter(job.status for job in jobs if job.status in _AT_WORK)
    for status, count in at_work.items():
        cure = "wait for their end where the system should be quiet"
        yield Finding("I4", _AT_WORK[status], str(count), cure, Severity.WARNING)
    late_s = 3 * site.settings.sweep_s + HINT_AGE_S  # longer than housekeeping that runs takes to notice
    for job in jobs:
        if job.status is _S.RUNNING and job.overdue_s is not None and job.overdue_s > 0:
            problem = f"its lease ran out {job.overdue_s:.0f} s ago and nobody has queued it again"
            severity = Severity.ERROR if job.overdue_s > late_s else Severity.WARNING
            yield Finding("I4", job.id, problem, HOUSEKEEPING, severity)
        crowded = at_work[job.status] > MAX_BACKLOG  # then some wait without a hint of their own
        if job.status in _WAITING and job.unheard_s > late_s and not crowded:
            problem = f"{job.status} without a message to the workers for {job.unheard_s:.0f} s"
            yield Finding("I4", job.id, problem, "see that Valkey is reachable and a control worker runs")


def _ended_by_halves(job: Row[Any]) -> Iterator[str]:
    if (job.status in FINAL) != (job.finished_at is not None):
        yield f"finished_at is {'missing' if job.finished_at is None else 'set'}"
    if (job.status is _S.FAILED) != (job.error is not None):
        yield f"its error is {'missing' if job.error is None else 'set'}"
    if job.status is not _S.SUCCEEDED and (job.fine_tuned_model or job.result_file):
        yield "it names a model or a results file"
    if job.status in _HELD and (job.lease_expires_at is None or job.worker is None or job.attempt < 1):
        yield "no attempt holds it"


def _held_by_halves(job: Row[Any]) -> Iterator[Finding]:
    job_id = job.id
    if job.status not in _HELD and job.lease_expires_at is not None:
        cure = "end the lease"
        yield Finding("I2", job_id, f"{job.status}, but it holds a lease", cure, repair=_letting_go(job_id))
    if job.status not in _PAUSABLE and job.pause_requested_at is not None:
        cure = "forget the request"
        problem = f"{job.status}, but a pause is asked for"
        yield Finding("I2", job_id, problem, cure, repair=_forgetting_pause(job_id))


def _letting_go(job_id: str) -> Any:
    def repair(session: Session) -> bool:
        held = (Job.id == job_id, Job.status.not_in(_HELD), Job.lease_expires_at.is_not(None))
        return bool(session.scalar(update(Job).where(*held).values(lease_expires_at=None).returning(Job.id)))

    return repair


def _forgetting_pause(job_id: str) -> Any:
    def repair(session: Session) -> bool:
        asked = (Job.id == job_id, Job.status.not_in(_PAUSABLE), Job.pause_requested_at.is_not(None))
        change = update(Job).where(*asked).values(pause_requested_at=None).returning(Job.id)
        return bool(session.scalar(change))

    return repair


def _unexplained(error: Any) -> str | None:
    """What a failed job's error lacks."""
    if not isinstance(error, dict):
        return None  # told by I2
    if error.get("code") not in list(FailureCode):
        return f"failed with {str(error.get('code'))[:40]!r}, which is no code of the list"
    message = error.get("message")
    if not isinstance(message, str) or len(message.split()) < 3 or "Traceback" in message:
        return "failed without a sentence that says why"
    return None

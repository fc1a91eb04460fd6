"""I3, I6, I7: a job's events are in order, without a gap or a double, and end with its end."""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy import String, case, cast, func, or_, select
from sqlalchemy.dialects.postgresql import distinct_on

from app.core.fsck.finding import BUG, Finding, Site
from app.core.status import FINAL, JobStatus
from app.core.tables import Job, JobEvent, TunedModel
from app.core.vocabulary import EventLevel, EventType

SUCCEEDED = "The job has successfully completed"
CANCELLED = "Fine-tuning job cancelled"
_ONCE = (
    "Created fine-tuning job:",
    "Files validated,",
    "New fine-tuned model created:",
    SUCCEEDED,
    CANCELLED,
)
_CHECKPOINT = "Checkpoint created at step "


def check_attempts(site: Site) -> Iterator[Finding]:
    """I3: once a newer attempt has written, no older one does."""
    newest = func.max(JobEvent.attempt).over(partition_by=JobEvent.job_id, order_by=JobEvent.sequence)
    written = select(JobEvent.job_id, JobEvent.attempt, newest.label("newest")).subquery()
    stale = (
        select(written.c.job_id, written.c.attempt, func.max(written.c.newest).label("newest"))
        .where(written.c.attempt < written.c.newest)
        .group_by(written.c.job_id, written.c.attempt)
    )
    ahead = (
        select(Job.id, func.max(JobEvent.attempt).label("attempt"))
        .join(JobEvent, JobEvent.job_id == Job.id)
        .group_by(Job.id)
        .having(func.max(JobEvent.attempt) > Job.attempt)
    )
    with site.snapshot() as session:
        for row in session.execute(stale):
            problem = f"attempt {row.attempt} wrote an event after attempt {row.newest} had begun"
            yield Finding("I3", row.job_id, problem, BUG)
        for job_id, attempt in session.execute(ahead):
            yield Finding("I3", job_id, f"an event of attempt {attempt}, which never was", BUG)


def check_metrics(site: Site) -> Iterator[Finding]:
    """I6: the steps with metrics are 1, 2, 3 … up to the newest, and for a succeeded job all of them."""
    total = JobEvent.data["total_steps"].astext
    steps = (
        select(
            Job.id,
            Job.status,
            func.count(JobEvent.id).label("steps"),
            func.min(JobEvent.step).label("first"),
            func.max(JobEvent.step).label("last"),
            func.count(func.distinct(total)).label("totals"),
            func.coalesce(func.bool_or(total == cast(JobEvent.step, String)), False).label("all"),
        )
        .outerjoin(JobEvent, (JobEvent.job_id == Job.id) & (JobEvent.type == EventType.METRICS))
        .group_by(Job.id)
    )
    with site.snapshot() as session:
        for job in session.execute(steps).yield_per(1000):
            if job.steps and (job.first != 1 or job.last != job.steps):
                problem = f"metrics of {job.steps} steps from {job.first} to {job.last}"
                yield Finding("I6", job.id, problem, BUG)
            elif job.status is JobStatus.SUCCEEDED and not job.all:
                yield Finding("I6", job.id, f"succeeded with metrics up to step {job.last or 0} only", BUG)
            if job.totals > 1:
                yield Finding("I6", job.id, "its metrics name different numbers of steps", BUG)


def check_messages(site: Site) -> Iterator[Finding]:
    """I6: what happens once in a job's life is told once, a checkpoint of a step too."""
    said = case(
        *((JobEvent.message.startswith(words), words) for words in _ONCE),
        else_=func.split_part(JobEvent.message, " with ", 1),
    )
    doubled = (
        select(JobEvent.job_id, said.label("said"), func.count().label("times"))
        .where(
            JobEvent.type == EventType.MESSAGE,
            or_(*(JobEvent.message.startswith(words) for words in (*_ONCE, _CHECKPOINT))),
        )
        .group_by(JobEvent.job_id, said)
        .having(func.count() > 1)
    )
    with site.snapshot() as session:
        for row in session.execute(doubled):
            yield Finding("I6", row.job_id, f"{row.times} events say {row.said!r}", BUG)


def check_ends(site: Site) -> Iterator[Finding]:
    """I2, I7: the last event of an ended job tells its end, and no other job has such an event."""
    last = (
        select(JobEvent.job_id, JobEvent.message, JobEvent.level)
        .ext(distinct_on(JobEvent.job_id))
        .order_by(JobEvent.job_id, JobEvent.sequence.desc())
        .subquery()
    )
    ends = (
        select(Job.id, Job.status, last.c.message, last.c.level)
        .outerjoin(last, last.c.job_id == Job.id)
        .where(Job.status.in_(FINAL))
    )
    closing = {JobStatus.SUCCEEDED: SUCCEEDED, JobStatus.CANCELLED: CANCELLED}
    early = (
        select(Job.id, Job.status, JobEvent.message)
        .join(JobEvent, JobEvent.job_id == Job.id)
        .where(
            JobEvent.type == EventType.MESSAGE,
            ((JobEvent.message == SUCCEEDED) & (Job.status != JobStatus.SUCCEEDED))
            | ((JobEvent.message == CANCELLED) & (Job.status != JobStatus.CANCELLED)),
        )
    )
    with site.snapshot() as session:
        for job in session.execute(ends).yield_per(1000):
            if job.status is JobStatus.FAILED:
                told = job.level is EventLevel.ERROR
            else:
                told = job.message == closing[job.status]
            if not told:
                invariant = "I7" if job.status is JobStatus.CANCELLED else "I2"
                yield Finding(invariant, job.id, f"{job.status}, but its last event does not say so", BUG)
        for job in session.execute(early):
            yield Finding("I2", job.id, f"{job.status}, though an event says {job.message!r}", BUG)


def check_cancelled(site: Site) -> Iterator[Finding]:
    """I7: a cancelled job gave no model its name; the checkpoints it had stay."""
    query = (
        select(TunedModel.id, TunedModel.job_id)
        .join(Job, Job.id == TunedModel.job_id)
        .where(
            Job.status == JobStatus.CANCELLED,
            TunedModel.is_checkpoint.is_(False),
            TunedModel.deleted_at.is_(None),
        )
    )
    with site.snapshot() as session:
        for model in session.execute(query):
            yield Finding("I7", model.job_id, f"cancelled, yet {model.id} answers in chat", BUG)

"""What keeps the promise that nothing stalls: lost hints, dead attempts, things past their time.

One process at a time sweeps, and one removes, each by an advisory lock of its own: what waits for a disk must
not keep dead jobs from their queue. Each round is one transaction.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

from sqlalchemy import func, literal, or_, select, text, update
from sqlalchemy.orm import Session

from app.core import attempts, files, idempotency, orphans, retention, served_models, training_states
from app.core.attempts import Attempt, Death
from app.core.failures import FailureCode
from app.core.outbox import after_commit
from app.core.queue import Sender, Task
from app.core.settings import Settings
from app.core.status import JobStatus
from app.core.storage import Storage
from app.core.tables import Job

log = logging.getLogger(__name__)
SWEEPING, REMOVING = 0x6C757469, 0x6C75746A  # advisory locks of this module
HINT_AGE_S = 10  # a waiting job whose last hint is older gets another
MAX_BACKLOG = 100  # hints waiting in one queue; more would only fill the broker while all workers are busy
STALE_S = 86_400  # an unfinished upload untouched for so long has lost its writer
_TASKS = {JobStatus.VALIDATING_FILES: Task.VALIDATE_JOB, JobStatus.QUEUED: Task.RUN_JOB}


@dataclass(frozen=True, slots=True)
class Swept:
    """What one round did."""

    hinted: int = 0
    requeued: int = 0
    expired: int = 0


def sweep(session: Session, storage: Storage, sender: Sender, settings: Settings) -> Swept | None:
    """Do one round, or return None when another process is at it."""
    room = {status: _room(sender, task) for status, task in _TASKS.items()}  # before anything is locked
    if not _alone(session, SWEEPING):
        return None
    requeued = _requeue_dead(session, storage, settings)
    expired = files.expire_files(session)
    hinted = sum(_hint_waiting(session, sender, status, limit=room[status]) for status in _TASKS)
    return Swept(hinted, requeued, expired)


def purge(session: Session, storage: Storage, settings: Settings) -> int:
    """Remove bytes that no row needs any more; returns how many things went."""
    if not _alone(session, REMOVING):
        return 0
    gone = files.purge_deleted(session, storage) + served_models.purge_deleted(session, storage)
    gone += idempotency.forget_old(session, settings)
    return gone + training_states.drop_unneeded(session, storage)


def tidy(session: Session, storage: Storage, settings: Settings) -> int:
    """Remove what no row has ever named or an attempt left behind, and stored answers past their time or
    without room; returns how many things went.

    Looks through whole folders and tables, so it is done more rarely than the rest.
    """
    if not _alone(session, REMOVING):
        return 0
    return (
        retention.drop_old(session, settings)
        + storage.drop_stale(age_s=STALE_S)
        + orphans.drop(session, storage, age_s=STALE_S)
    )


def _alone(session: Session, lock: int) -> bool:
    """Whether no other process is at it, until this transaction ends."""
    return bool(session.scalar(text("SELECT pg_try_advisory_xact_lock(:key)"), {"key": lock}))


def _requeue_dead(session: Session, storage: Storage, settings: Settings) -> int:
    dead = attempts.find_dead(session)
    for attempt, worker in dead:
        after_commit(session, partial(storage.delete, attempt.folder_key))
        if _lost_the_database(session, attempt, lease_s=settings.lease_s):
            attempts.hand_back(session, attempt, reason="The database was restarted")
            continue
        reason = f"The worker {worker} that ran attempt {attempt.number} is gone."
        death = Death(reason, FailureCode.WORKER_LOST)
        most, pause_s = settings.max_attempts, settings.retry_pause_s
        status = attempts.requeue(session, attempt, death=death, max_attempts=most, pause_s=pause_s)
        log.warning("job %s: attempt %d dead on %s, now %s", attempt.job_id, attempt.number, worker, status)
    return len(dead)


def _lost_the_database(session: Session, attempt: Attempt, *, lease_s: float) -> bool:
    """Whether the attempt has not renewed since the server began: its worker may live, and could not."""
    begun = func.pg_postmaster_start_time()
    earlier = Job.lease_expires_at < begun + literal(timedelta(seconds=lease_s))
    return bool(session.scalar(select(earlier).where(Job.id == attempt.job_id)))


def _room(sender: Sender, task: Task) -> int:
    """How many hints the task's queue may still take; none while the broker is away."""
    try:
        return max(0, MAX_BACKLOG - sender.backlog(task))
    except Exception as error:  # kombu raises a different class for each kind of failure
        log.warning("the queue of %s cannot be read: %s", task, type(error).__name__)
        return 0


def _hint_waiting(session: Session, sender: Sender, status: JobStatus, *, limit: int) -> int:
    now = func.clock_timestamp()
    stale = or_(Job.hinted_at.is_(None), Job.hinted_at < now - timedelta(seconds=HINT_AGE_S))
    rested = or_(Job.not_before.is_(None), Job.not_before <= now)
    query = select(Job.id).where(Job.status == status, stale, rested)
    query = query.order_by(Job.priority.desc(), Job.created_at).limit(limit)
    ids = session.scalars(query.with_for_update(skip_locked=True)).all()
    session.execute(update(Job).where(Job.id.in_(ids)).values(hinted_at=now))
    for job_id in ids:
        sender.hint_on_commit(session, _TASKS[status], job_id)
    return len(ids)

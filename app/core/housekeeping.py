"""What keeps the promise that nothing stalls: lost hints, dead attempts, things past their time.

One process at a time does this, by an advisory lock. Each round is one short transaction.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import or_, select, text
from sqlalchemy.orm import Session

from app.core import attempts, files, served_models
from app.core.db import utc_now
from app.core.queue import Sender, Task
from app.core.settings import Settings
from app.core.status import JobStatus
from app.core.storage import Storage
from app.core.tables import Job

log = logging.getLogger(__name__)
LOCK = 0x6C757469  # advisory lock of this module
HINT_AGE_S = 10  # a waiting job whose last hint is older gets another


@dataclass(frozen=True, slots=True)
class Swept:
    """What one round did."""

    hinted: int = 0
    requeued: int = 0
    expired: int = 0
    purged: int = 0


def sweep(session: Session, storage: Storage, sender: Sender, settings: Settings) -> Swept | None:
    """Do one round, or return None when another process is at it."""
    if not session.scalar(text("SELECT pg_try_advisory_xact_lock(:key)"), {"key": LOCK}):
        return None
    requeued = _requeue_dead(session, max_attempts=settings.max_attempts)
    expired = files.expire_files(session)
    purged = files.purge_deleted(session, storage) + served_models.purge_deleted(session, storage)
    return Swept(_hint_waiting(session, sender), requeued, expired, purged)


def _requeue_dead(session: Session, *, max_attempts: int) -> int:
    dead = attempts.find_dead(session)
    for attempt, worker in dead:
        reason = f"The worker {worker} that ran attempt {attempt.number} is gone."
        status = attempts.requeue(session, attempt, reason=reason, max_attempts=max_attempts)
        log.warning("job %s: attempt %d dead on %s, now %s", attempt.job_id, attempt.number, worker, status)
    return len(dead)


def _hint_waiting(session: Session, sender: Sender) -> int:
    tasks = {JobStatus.VALIDATING_FILES: Task.VALIDATE_JOB, JobStatus.QUEUED: Task.RUN_JOB}
    stale = or_(Job.hinted_at.is_(None), Job.hinted_at < utc_now() - timedelta(seconds=HINT_AGE_S))
    rows = session.scalars(
        select(Job).where(Job.status.in_(tasks), stale).with_for_update(skip_locked=True).limit(200)
    ).all()
    for job in rows:
        job.hinted_at = utc_now()
        sender.hint_on_commit(session, tasks[job.status], job.id)
    return len(rows)

"""Jobs as the client sees them, with what those that wait can expect."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

from fastapi import Depends
from sqlalchemy.orm import Session

from app.api.dependencies import ContextDep, SessionDep
from app.api.presences import TrainingWorkers
from app.api.schemas.job_objects import JobObject, job_object
from app.core.status import JobStatus
from app.core.tables import Job
from app.core.waiting import outlooks

Show = Callable[[Sequence[Job]], list[JobObject]]


def get_show(context: ContextDep, session: SessionDep) -> Show:
    """How this request shows rows."""
    return lambda jobs: _show(context.training_workers, session, jobs)


ShowDep = Annotated[Show, Depends(get_show, scope="function")]


def _show(workers: TrainingWorkers, session: Session, jobs: Sequence[Job]) -> list[JobObject]:
    session.flush()
    waits = any(job.status is JobStatus.QUEUED for job in jobs)
    expected = outlooks(session, jobs, workers=workers.list() if waits else None)
    return [job_object(job, expected.get(job.id)) for job in jobs]

"""What every route of jobs works with: who asks, the request's transaction, and how rows are shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends
from sqlalchemy.orm import Session

from app.api.context import Context
from app.api.dependencies import CallerDep, ContextDep, SessionDep
from app.api.schemas.job_objects import JobObject, job_object
from app.core.keys import Caller
from app.core.status import JobStatus
from app.core.tables import Job
from app.core.waiting import outlooks


@dataclass(frozen=True, slots=True)
class JobDesk:
    """One request about jobs."""

    context: Context
    caller: Caller
    session: Session

    @property
    def project_id(self) -> str:
        """Whose jobs are to be seen."""
        return self.caller.project_id

    def show(self, job: Job) -> JobObject:
        """A job as the client sees it."""
        return self.show_all([job])[0]

    def show_all(self, jobs: Sequence[Job]) -> list[JobObject]:
        """Jobs as the client sees them, with what those that wait can expect."""
        self.session.flush()
        waits = any(job.status is JobStatus.QUEUED for job in jobs)
        workers = self.context.training_workers.list() if waits else None
        expected = outlooks(self.session, jobs, workers=workers)
        return [job_object(job, expected.get(job.id)) for job in jobs]


def get_job_desk(context: ContextDep, caller: CallerDep, session: SessionDep) -> JobDesk:
    """The desk of this request."""
    return JobDesk(context, caller, session)


JobDeskDep = Annotated[JobDesk, Depends(get_job_desk, scope="function")]

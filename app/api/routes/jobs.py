"""/v1/fine_tuning/jobs: create, list, get, cancel; their events and checkpoints."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Response

from app.api.body import JsonBody, json_request
from app.api.dependencies import CallerDep, ContextDep, SessionDep
from app.api.once import OnceDep
from app.api.schemas.fields import Id
from app.api.schemas.job_objects import (
    CheckpointObject,
    EventObject,
    JobObject,
    checkpoint_object,
    event_object,
    job_object,
)
from app.api.schemas.jobs import CheckpointsQuery, CreateJob, JobsQuery
from app.api.schemas.lists import ListObject, PageQuery, list_object
from app.core import events, jobs

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"])
CreateJobBody = Annotated[CreateJob, Depends(JsonBody(CreateJob))]


@router.post("", response_model=JobObject, openapi_extra=json_request(CreateJob))
def create_job(
    body: CreateJobBody, caller: CallerDep, context: ContextDep, session: SessionDep, once: OnceDep
) -> Response:
    """Create a fine-tuning job. Its files are checked afterwards; bad data fails the job."""

    def create() -> JobObject:
        new = body.new_job()
        return job_object(jobs.create_job(session, context.sender, context.catalogue, caller=caller, new=new))

    return once(session, create)


@router.get("")
def list_jobs(
    query: Annotated[JobsQuery, Query()], caller: CallerDep, session: SessionDep
) -> ListObject[JobObject]:
    """List jobs, newest first."""
    without = query.metadata == "null"
    metadata = query.metadata if isinstance(query.metadata, dict) else None
    page = jobs.list_jobs(
        session, project_id=caller.project_id, metadata=metadata, without=without, cursor=query.cursor()
    )
    return list_object([job_object(row) for row in page.data], has_more=page.has_more)


@router.get("/{job_id}")
def retrieve_job(job_id: Id, caller: CallerDep, session: SessionDep) -> JobObject:
    """Get a job."""
    return job_object(jobs.get_job(session, project_id=caller.project_id, job_id=job_id))


@router.post("/{job_id}/cancel")
def cancel_job(job_id: Id, caller: CallerDep, session: SessionDep) -> JobObject:
    """Cancel a job that is not finished; cancelling it again changes nothing."""
    return job_object(jobs.cancel_job(session, project_id=caller.project_id, job_id=job_id))


@router.get("/{job_id}/events")
def list_events(
    job_id: Id, query: Annotated[PageQuery, Query()], caller: CallerDep, session: SessionDep
) -> ListObject[EventObject]:
    """List what happened to a job, newest first."""
    job = jobs.get_job(session, project_id=caller.project_id, job_id=job_id)
    page = events.list_events(session, job_id=job.id, cursor=query.cursor())
    return list_object([event_object(row) for row in page.data], has_more=page.has_more)


@router.get("/{job_id}/checkpoints")
def list_checkpoints(
    job_id: Id, query: Annotated[CheckpointsQuery, Query()], caller: CallerDep, session: SessionDep
) -> ListObject[CheckpointObject]:
    """List the kept checkpoints of a job, newest first."""
    job = jobs.get_job(session, project_id=caller.project_id, job_id=job_id)
    page = events.list_checkpoints(session, job_id=job.id, cursor=query.cursor())
    return list_object([checkpoint_object(row) for row in page.data], has_more=page.has_more)

"""/v1/fine_tuning/jobs: create, list, get, cancel, pause, resume; their events and checkpoints."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Response

from app.api.body import JsonBody, json_request
from app.api.dependencies import CallerDep, ContextDep, SessionDep
from app.api.once import OnceDep
from app.api.outlook import ShowDep
from app.api.schemas.fields import Id
from app.api.schemas.job_objects import (
    CheckpointObject,
    EventObject,
    JobObject,
    checkpoint_object,
    event_object,
)
from app.api.schemas.jobs import CheckpointsQuery, CreateJob, JobsQuery
from app.api.schemas.lists import ListObject, PageQuery, list_object
from app.core import events, jobs

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"])
CreateJobBody = Annotated[CreateJob, Depends(JsonBody(CreateJob))]


@router.post("", response_model=JobObject, openapi_extra=json_request(CreateJob))
def create_job(
    body: CreateJobBody,
    caller: CallerDep,
    context: ContextDep,
    session: SessionDep,
    show: ShowDep,
    once: OnceDep,
) -> Response:
    """Create a fine-tuning job. Its files are checked afterwards; bad data fails the job."""

    def create() -> JobObject:
        new = body.new_job()
        job = jobs.create_job(session, context.sender, context.catalogue, caller=caller, new=new)
        return show([job])[0]

    return once(session, create)


@router.get("")
def list_jobs(
    query: Annotated[JobsQuery, Query()], caller: CallerDep, session: SessionDep, show: ShowDep
) -> ListObject[JobObject]:
    """List jobs, newest first."""
    without = query.metadata == "null"
    metadata = query.metadata if isinstance(query.metadata, dict) else None
    page = jobs.list_jobs(
        session, project_id=caller.project_id, metadata=metadata, without=without, cursor=query.cursor()
    )
    return list_object(show(page.data), has_more=page.has_more)


@router.get("/{job_id}")
def retrieve_job(job_id: Id, caller: CallerDep, session: SessionDep, show: ShowDep) -> JobObject:
    """Get a job."""
    job = jobs.get_job(session, project_id=caller.project_id, job_id=job_id)
    return show([job])[0]


@router.post("/{job_id}/cancel")
def cancel_job(job_id: Id, caller: CallerDep, session: SessionDep, show: ShowDep) -> JobObject:
    """Cancel a job that is not finished; cancelling it again changes nothing."""
    job = jobs.cancel_job(session, project_id=caller.project_id, job_id=job_id)
    return show([job])[0]


@router.post("/{job_id}/pause")
def pause_job(job_id: Id, caller: CallerDep, session: SessionDep, show: ShowDep) -> JobObject:
    """Pause a job: a running one saves a checkpoint first. Pausing it again changes nothing."""
    job = jobs.pause_job(session, project_id=caller.project_id, job_id=job_id)
    return show([job])[0]


@router.post("/{job_id}/resume")
def resume_job(
    job_id: Id, caller: CallerDep, context: ContextDep, session: SessionDep, show: ShowDep
) -> JobObject:
    """Let a paused job go on from where it was. Resuming it again changes nothing."""
    job = jobs.resume_job(session, context.sender, project_id=caller.project_id, job_id=job_id)
    return show([job])[0]


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

"""/v1/fine_tuning/jobs: create, list, get, cancel, pause, resume; their events and checkpoints."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Response

from app.api.body import JsonBody, json_request
from app.api.dry_runs import dry_run
from app.api.job_desk import JobDeskDep
from app.api.once import OnceDep, json_response
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
def create_job(body: CreateJobBody, desk: JobDeskDep, once: OnceDep) -> Response:
    """Create a fine-tuning job. Its files are checked afterwards; bad data fails the job.

    With `luthier.dry_run` nothing is created: the answer is the job as it would be once they are checked.
    """
    if body.is_dry_run:
        return json_response(dry_run(desk, body.new_job()))
    context = desk.context

    def create() -> JobObject:
        new = body.new_job()
        job = jobs.create_job(desk.session, context.sender, context.catalogue, caller=desk.caller, new=new)
        return desk.show(job)

    return once(desk.session, create)


@router.get("")
def list_jobs(query: Annotated[JobsQuery, Query()], desk: JobDeskDep) -> ListObject[JobObject]:
    """List jobs, newest first."""
    page = jobs.list_jobs(
        desk.session,
        project_id=desk.project_id,
        metadata=query.pairs,
        without=query.without,
        cursor=query.cursor(),
    )
    return list_object(desk.show_all(page.data), has_more=page.has_more)


@router.get("/{job_id}")
def retrieve_job(job_id: Id, desk: JobDeskDep) -> JobObject:
    """Get a job."""
    return desk.show(jobs.get_job(desk.session, project_id=desk.project_id, job_id=job_id))


@router.post("/{job_id}/cancel")
def cancel_job(job_id: Id, desk: JobDeskDep) -> JobObject:
    """Cancel a job that is not finished; cancelling it again changes nothing."""
    return desk.show(jobs.cancel_job(desk.session, project_id=desk.project_id, job_id=job_id))


@router.post("/{job_id}/pause")
def pause_job(job_id: Id, desk: JobDeskDep) -> JobObject:
    """Pause a job: a running one saves a checkpoint first. Pausing it again changes nothing."""
    return desk.show(jobs.pause_job(desk.session, project_id=desk.project_id, job_id=job_id))


@router.post("/{job_id}/resume")
def resume_job(job_id: Id, desk: JobDeskDep) -> JobObject:
    """Let a paused job go on from where it was. Resuming it again changes nothing."""
    sender = desk.context.sender
    return desk.show(jobs.resume_job(desk.session, sender, project_id=desk.project_id, job_id=job_id))


@router.get("/{job_id}/events")
def list_events(
    job_id: Id, query: Annotated[PageQuery, Query()], desk: JobDeskDep
) -> ListObject[EventObject]:
    """List what happened to a job, newest first."""
    job = jobs.get_job(desk.session, project_id=desk.project_id, job_id=job_id)
    page = events.list_events(desk.session, job_id=job.id, cursor=query.cursor())
    return list_object([event_object(row) for row in page.data], has_more=page.has_more)


@router.get("/{job_id}/checkpoints")
def list_checkpoints(
    job_id: Id, query: Annotated[CheckpointsQuery, Query()], desk: JobDeskDep
) -> ListObject[CheckpointObject]:
    """List the kept checkpoints of a job, newest first."""
    job = jobs.get_job(desk.session, project_id=desk.project_id, job_id=job_id)
    page = events.list_checkpoints(desk.session, job_id=job.id, cursor=query.cursor())
    best = events.find_best_checkpoint(desk.session, job_id=job.id)
    found = [checkpoint_object(row, is_best=row is best) for row in page.data]
    return list_object(found, has_more=page.has_more)

"""Fine-tuning jobs as users see them: create, get, list, cancel. What workers do is in attempts.py."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from app.core import attempts, events, files, served_models
from app.core.base_models import Catalogue
from app.core.db import utc_now
from app.core.errors import InvalidRequest, NotFound
from app.core.ids import Prefix, new_id
from app.core.keys import Caller
from app.core.pages import Cursor, Page, read_page
from app.core.queue import Sender, Task
from app.core.status import FINAL, JobStatus, may_become
from app.core.tables import Job
from app.core.vocabulary import Purpose

_SUFFIX = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True, slots=True)
class NewJob:
    """What a user asks for, ranges already checked. `luthier` holds only what was given."""

    model: str
    training_file: str
    validation_file: str | None = None
    method: str = "supervised"
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    luthier: dict[str, Any] = field(default_factory=dict)
    suffix: str | None = None
    seed: int | None = None
    metadata: dict[str, str] | None = None


def create_job(session: Session, sender: Sender, catalogue: Catalogue, *, caller: Caller, new: NewJob) -> Job:
    """Check names and add the row. Data is checked later: a bad file fails the job, not the request."""
    job = make_job(session, catalogue, caller=caller, new=new)
    job.hinted_at = func.clock_timestamp()
    session.add(job)
    session.flush()
    events.add_message(session, job, f"Created fine-tuning job: {job.id}")
    both = "" if job.validation_file is None else f" and validation file: {job.validation_file}"
    events.add_message(session, job, f"Validating training file: {job.training_file}{both}")
    sender.hint_on_commit(session, Task.VALIDATE_JOB, job.id)
    return job


def make_job(session: Session, catalogue: Catalogue, *, caller: Caller, new: NewJob) -> Job:
    """Check names; the row as it would be added."""
    start = served_models.find_start(session, catalogue, project_id=caller.project_id, name=new.model)
    if start is None:
        raise InvalidRequest(
            f"Model {new.model[:120]} is not available for fine-tuning or does not exist. "
            "GET /v1/models lists the models of this project.",
            code="model_not_available",
            param="model",
        )
    _check_file(session, caller, new.training_file, "training_file")
    if new.validation_file is not None:
        _check_file(session, caller, new.validation_file, "validation_file")
    if new.suffix is not None and not _SUFFIX.fullmatch(new.suffix):
        raise InvalidRequest(
            "suffix must be 1 to 64 letters, digits, '-', '_' or '.', beginning with a letter or digit.",
            code="invalid_value",
            param="suffix",
        )
    return Job(
        id=new_id(Prefix.JOB),
        project_id=caller.project_id,
        organization_id=caller.organization_id,
        status=JobStatus.VALIDATING_FILES,
        model=new.model,
        base_model=start.base_model,
        training_file=new.training_file,
        validation_file=new.validation_file,
        method=new.method,
        hyperparameters=dict.fromkeys(_HYPERPARAMETERS, "auto") | new.hyperparameters,
        luthier=served_models.training_options(start, new.luthier),
        suffix=new.suffix,
        seed=secrets.randbelow(2**31) if new.seed is None else new.seed,
        user_metadata=new.metadata,
        priority=new.luthier.get("priority", 0),
        created_at=utc_now(),
        attempt=0,
    )


_HYPERPARAMETERS = ("n_epochs", "batch_size", "learning_rate_multiplier")


def get_job(session: Session, *, project_id: str, job_id: str) -> Job:
    """A job of the project."""
    job = session.scalar(select(Job).where(Job.project_id == project_id, Job.id == job_id))
    if job is None:
        raise _not_found(job_id)
    return job


def list_jobs(
    session: Session, *, project_id: str, metadata: dict[str, str] | None, without: bool, cursor: Cursor
) -> Page[Job]:
    """Jobs of the project, newest first; `metadata` filters by pairs, `without` keeps those with none."""
    query = select(Job).where(Job.project_id == project_id)
    if without:
        query = query.where(Job.user_metadata.is_(None))
    elif metadata:
        query = query.where(Job.user_metadata.contains(metadata))
    return read_page(session, query, keys=(Job.created_at, Job.id), cursor=cursor)


def cancel_job(session: Session, *, project_id: str, job_id: str) -> Job:
    """Cancel at once, whatever the job is doing; its worker notices and stops. Repeating is no error."""
    job = _lock(session, project_id=project_id, job_id=job_id)
    if job.status is JobStatus.CANCELLED:
        return job
    _check_move(job, JobStatus.CANCELLED, "be cancelled")
    _set(session, job, attempts.ended(JobStatus.CANCELLED))
    events.add_message(session, job, "Fine-tuning job cancelled")
    return job


def pause_job(session: Session, *, project_id: str, job_id: str) -> Job:
    """Pause: a waiting job at once, a running one when it has saved where it is. Repeating is no error."""
    job = _lock(session, project_id=project_id, job_id=job_id)
    if job.status is JobStatus.PAUSED or job.pause_requested_at is not None:
        return job
    _check_move(job, JobStatus.PAUSED, "be paused")
    if job.status is JobStatus.QUEUED:
        job.status = JobStatus.PAUSED
        events.add_message(session, job, "The job is paused; resume it when it shall go on")
    else:
        job.pause_requested_at = utc_now()
        events.add_message(session, job, "Pause requested")
    return job


def resume_job(session: Session, sender: Sender, *, project_id: str, job_id: str) -> Job:
    """Put a paused job back into the queue, or withdraw a pause not yet reached. Repeating is no error."""
    job = _lock(session, project_id=project_id, job_id=job_id)
    if job.status in FINAL:
        raise _wrong_state(job, "be resumed")
    if job.status is JobStatus.PAUSED:
        job.status = JobStatus.QUEUED
        job.hinted_at = func.clock_timestamp()
        events.add_message(session, job, "The job is resumed and queued")
        sender.hint_on_commit(session, Task.RUN_JOB, job.id)
    elif job.pause_requested_at is not None:
        job.pause_requested_at = None
        events.add_message(session, job, "Pause request withdrawn")
    return job


def _lock(session: Session, *, project_id: str, job_id: str) -> Job:
    query = select(Job).where(Job.project_id == project_id, Job.id == job_id).with_for_update()
    job = session.scalar(query)
    if job is None:
        raise _not_found(job_id)
    return job


def _set(session: Session, job: Job, values: dict[str, Any]) -> None:
    session.execute(update(Job).where(Job.id == job.id).values(values))
    session.refresh(job)


def _check_move(job: Job, target: JobStatus, what: str) -> None:
    if not may_become(job.status, target):
        raise _wrong_state(job, what)


def _wrong_state(job: Job, what: str) -> InvalidRequest:
    return InvalidRequest(
        f"Job {job.id} has already {job.status}; only a job that is not finished can {what}.",
        code="invalid_job_state",
        param="fine_tuning_job_id",
    )


def _check_file(session: Session, caller: Caller, file_id: str, param: str) -> None:
    try:
        row = files.get_file(session, project_id=caller.project_id, file_id=file_id, lock=True)
    except NotFound:
        raise InvalidRequest(
            f"No such File object: {file_id[:80]}", param=param, code="invalid_value"
        ) from None
    if row.purpose is not Purpose.FINE_TUNE:
        raise InvalidRequest(
            f"File {file_id} has purpose '{row.purpose}'. Upload it with purpose 'fine-tune'.",
            param=param,
            code="invalid_value",
        )


def _not_found(job_id: str) -> NotFound:
    return NotFound(
        f"Could not find fine tune: {job_id[:80]}", code="fine_tune_not_found", param="fine_tune_id"
    )

"""Rows of a finished past, made directly: jobs that ran, their events, checkpoints and models."""

from __future__ import annotations

import io
from datetime import datetime
from typing import Any

from sqlalchemy.orm import Session

from app.core import events, keys
from app.core.base_models import DEFAULT_BASE_MODEL
from app.core.completions import WeightsKind
from app.core.db import utc_now
from app.core.files import NewFile, create_file
from app.core.ids import Prefix, new_id
from app.core.status import JobStatus
from app.core.storage import Storage
from app.core.stored_completions import NewCompletion, keep_completion
from app.core.stored_responses import NewResponse, keep_response
from app.core.tables import Checkpoint, File, Job, Project, StoredCompletion, StoredResponse, TunedModel
from app.core.vocabulary import Purpose

LUTHIER: dict[str, Any] = {
    "adapter": "qlora",
    "rank": 16,
    "alpha": 32,
    "dropout": 0.0,
    "target_modules": [],
    "max_length": None,
    "checkpoint_interval": None,
    "priority": 0,
}
NUMBERS: dict[str, Any] = {"n_epochs": 3, "batch_size": 1, "learning_rate_multiplier": 1.0}


def make_project(
    session: Session, *, name: str = "default", organization: str = "acme"
) -> tuple[Project, str]:
    """A project and the secret of a key for it."""
    project = keys.ensure_project(session, project=name, organization=organization)
    _, secret = keys.create_key(session, project=project, name=f"key of {name}")
    return project, secret


def make_file(
    session: Session,
    storage: Storage,
    *,
    project: Project,
    data: bytes = b'{"messages": []}\n',
    purpose: Purpose = Purpose.FINE_TUNE,
) -> File:
    """A file whose bytes are in storage."""
    pending = storage.begin()
    for piece in iter(io.BytesIO(data)):
        pending.write(piece)
    new = NewFile(filename="data.jsonl", purpose=purpose)
    return create_file(session, storage, project_id=project.id, new=new, pending=pending)


def make_job(
    session: Session, *, project: Project, status: JobStatus = JobStatus.QUEUED, **values: Any
) -> Job:
    """A job in the state asked for, with the first two events of every job."""
    final = status in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED)
    defaults: dict[str, Any] = {
        "id": new_id(Prefix.JOB),
        "project_id": project.id,
        "organization_id": project.organization_id,
        "status": status,
        "model": DEFAULT_BASE_MODEL,
        "base_model": DEFAULT_BASE_MODEL,
        "training_file": "file-training",
        "validation_file": None,
        "method": "supervised",
        "hyperparameters": dict(NUMBERS),
        "luthier": dict(LUTHIER),
        "suffix": None,
        "seed": 42,
        "finished_at": utc_now() if final else None,
    }
    job = Job(**(defaults | values))
    session.add(job)
    session.flush()
    events.add_message(session, job, f"Created fine-tuning job: {job.id}")
    events.add_message(session, job, f"Validating training file: {job.training_file}")
    return job


def make_model(
    session: Session, job: Job, *, name: str, is_checkpoint: bool = False, created_at: datetime | None = None
) -> TunedModel:
    """A tuned model of a job. Its weights are not in storage."""
    model = TunedModel(
        id=name,
        project_id=job.project_id,
        job_id=job.id,
        base_model=job.base_model,
        kind=WeightsKind.LORA,
        storage_key=f"weights/{new_id(Prefix.FILE)}",
        is_checkpoint=is_checkpoint,
        created_at=created_at or utc_now(),
    )
    session.add(model)
    session.flush()
    return model


def make_checkpoint(session: Session, job: Job, *, step: int, uid: str) -> Checkpoint:
    """A checkpoint and the model it answers as."""
    name = f"ft:{job.base_model}:acme:{job.suffix or ''}:{uid}:ckpt-step-{step}"
    model = make_model(session, job, name=name, is_checkpoint=True)
    checkpoint = Checkpoint(
        id=new_id(Prefix.CHECKPOINT),
        job_id=job.id,
        model_id=model.id,
        step_number=step,
        metrics={"step": step, "train_loss": 1.5 / step, "full_valid_loss": None},
    )
    session.add(checkpoint)
    session.flush()
    return checkpoint


def make_finished_job(session: Session, storage: Storage, *, project: Project, n_checkpoints: int = 3) -> Job:
    """A job that succeeded: files, events, metrics, checkpoints, a model."""
    training = make_file(session, storage, project=project)
    results = make_file(session, storage, project=project, purpose=Purpose.FINE_TUNE_RESULTS)
    name = f"ft:{DEFAULT_BASE_MODEL}:acme::{new_id(Prefix.JOB)[-8:]}"
    job = make_job(
        session,
        project=project,
        status=JobStatus.SUCCEEDED,
        training_file=training.id,
        result_file=results.id,
        fine_tuned_model=name,
        trained_tokens=51_200,
    )
    make_model(session, job, name=name)
    events.add_message(session, job, "Files validated, moving job to queued state")
    events.add_message(session, job, "Fine-tuning job started")
    for step in range(1, n_checkpoints + 1):
        data = {"step": step, "total_steps": n_checkpoints, "train_loss": 1.5 / step}
        events.add_metrics(session, job, message=f"Step {step}/{n_checkpoints}", step=step, data=data)
        make_checkpoint(session, job, step=step, uid=new_id(Prefix.JOB)[-8:])
    events.add_message(session, job, f"New fine-tuned model created: {name}")
    events.add_message(session, job, "The job has successfully completed")
    return job


def make_stored_completion(session: Session, *, project: Project) -> StoredCompletion:
    """A chat completion that was stored."""
    request: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "options": {}}
    response = {"id": new_id(Prefix.COMPLETION), "model": DEFAULT_BASE_MODEL, "choices": []}
    return keep_completion(session, project_id=project.id, new=NewCompletion(request, response, None))


def make_stored_response(session: Session, *, project: Project) -> StoredResponse:
    """A response that was stored."""
    response = {"id": new_id(Prefix.RESPONSE), "model": DEFAULT_BASE_MODEL, "output": []}
    new = NewResponse(response | {"previous_response_id": None}, [])
    return keep_response(session, project_id=project.id, new=new)

"""Jobs, events and checkpoints as they leave."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from app.api.schemas.lists import ListItem
from app.core.tables import Checkpoint, Job, JobEvent
from app.core.waiting import Outlook


class JobObject(ListItem):
    """A fine-tuning job; `luthier` holds our own extensions."""

    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    model: str
    fine_tuned_model: str | None
    organization_id: str
    status: str
    error: dict[str, str | None] | None
    training_file: str
    validation_file: str | None
    result_files: list[str]
    trained_tokens: int | None
    seed: int
    hyperparameters: dict[str, Any]
    method: dict[str, Any]
    integrations: list[Any]
    metadata: dict[str, str] | None
    user_provided_suffix: str | None
    luthier: dict[str, Any]


class EventObject(ListItem):
    """Something that happened to a job."""

    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: str
    message: str
    type: str
    data: dict[str, Any]


class CheckpointObject(ListItem):
    """A saved state of a job, usable in chat."""

    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str
    step_number: int
    metrics: dict[str, Any]
    luthier: dict[str, Any]


def job_object(job: Job, outlook: Outlook | None = None) -> JobObject:
    """A row as the client sees it; the hyperparameters stand in both of their places."""
    outlook = outlook or Outlook()
    return JobObject(
        id=job.id,
        created_at=int(job.created_at.timestamp()),
        finished_at=_seconds(job.finished_at),
        estimated_finish=_seconds(job.estimated_finish),
        model=job.model,
        fine_tuned_model=job.fine_tuned_model,
        organization_id=job.organization_id,
        status=str(job.status),
        error=job.error,
        training_file=job.training_file,
        validation_file=job.validation_file,
        result_files=[] if job.result_file is None else [job.result_file],
        trained_tokens=job.trained_tokens,
        seed=job.seed,
        hyperparameters=job.hyperparameters,
        method={"type": job.method, job.method: {"hyperparameters": job.hyperparameters}},
        integrations=[],
        metadata=job.user_metadata,
        user_provided_suffix=job.suffix,
        luthier={"estimate": None, "base_full_valid_loss": None, "full_valid_loss": None}
        | job.luthier
        | {
            "attempt": job.attempt,
            "pausing": job.pause_requested_at is not None,
            "queued_reason": outlook.queued_reason,
            "queue_position": outlook.queue_position,
            "estimated_start": _seconds(outlook.estimated_start),
            "estimated_finish": _seconds(outlook.estimated_finish),
        },
    )


def event_object(event: JobEvent) -> EventObject:
    """A row as the client sees it."""
    return EventObject(
        id=event.id,
        created_at=int(event.created_at.timestamp()),
        level=str(event.level),
        message=event.message,
        type=str(event.type),
        data=event.data,
    )


def checkpoint_object(checkpoint: Checkpoint, *, is_best: bool) -> CheckpointObject:
    """A row as the client sees it."""
    return CheckpointObject(
        id=checkpoint.id,
        created_at=int(checkpoint.created_at.timestamp()),
        fine_tuning_job_id=checkpoint.job_id,
        fine_tuned_model_checkpoint=checkpoint.model_id,
        step_number=checkpoint.step_number,
        metrics=checkpoint.metrics,
        luthier={"best": is_best},
    )


def _seconds(moment: datetime | None) -> int | None:
    return None if moment is None else int(moment.timestamp())

"""A job's events and checkpoints as a user reads them. What happened is written here, why elsewhere."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Select, func, select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app.core.ids import Prefix, new_id
from app.core.pages import Cursor, Page, read_page
from app.core.tables import Checkpoint, Job, JobEvent, TunedModel
from app.core.vocabulary import EventLevel, EventType


def add_message(
    session: Session, job: Job, message: str, *, level: EventLevel = EventLevel.INFO, id: str | None = None
) -> None:
    """Record something in words. Characters that no log can show are left out.

    `id`: given by a caller who may have to repeat this after a commit whose answer was lost; recorded once.
    """
    if id is not None and session.get(JobEvent, id) is not None:
        return
    session.add(
        JobEvent(
            id=id or new_id(Prefix.EVENT),
            created_at=func.clock_timestamp(),
            job_id=job.id,
            attempt=job.attempt,
            level=level,
            type=EventType.MESSAGE,
            message="".join(c for c in message if c.isprintable() or c == "\n")[:2000],
            data={},
        )
    )
    session.flush()


def add_metrics(session: Session, job: Job, *, message: str, step: int, data: dict[str, Any]) -> None:
    """Record the numbers of a step once; a step trained again after a crash changes nothing."""
    session.execute(
        insert(JobEvent)
        .values(
            id=new_id(Prefix.EVENT),
            job_id=job.id,
            attempt=job.attempt,
            created_at=func.clock_timestamp(),
            level=EventLevel.INFO,
            type=EventType.METRICS,
            message=message,
            step=step,
            data=data,
        )
        .on_conflict_do_nothing(index_elements=["job_id", "step"], index_where=text("type = 'metrics'"))
    )


def list_events(session: Session, *, job_id: str, cursor: Cursor) -> Page[JobEvent]:
    """Events of a job, newest first."""
    query = select(JobEvent).where(JobEvent.job_id == job_id)
    return read_page(session, query, keys=(JobEvent.sequence, JobEvent.id), cursor=cursor)


def list_metrics(session: Session, *, job_id: str) -> list[dict[str, Any]]:
    """The numbers of all steps in order, for the results file."""
    query = select(JobEvent.data).where(JobEvent.job_id == job_id, JobEvent.type == EventType.METRICS)
    return list(session.scalars(query.order_by(JobEvent.step)))


def list_checkpoints(session: Session, *, job_id: str, cursor: Cursor) -> Page[Checkpoint]:
    """Kept checkpoints of a job, newest first; one whose model its owner deleted is gone too."""
    query = _kept(job_id)
    return read_page(session, query, keys=(Checkpoint.step_number, Checkpoint.id), cursor=cursor)


def find_best_checkpoint(session: Session, *, job_id: str) -> Checkpoint | None:
    """The kept one with the lowest loss on the whole validation file, the first of equals."""
    loss = Checkpoint.metrics["full_valid_loss"].as_float()
    query = _kept(job_id).where(loss.is_not(None)).order_by(loss, Checkpoint.step_number)
    return session.scalar(query.limit(1))


def _kept(job_id: str) -> Select[Checkpoint]:
    return (
        select(Checkpoint)
        .join(TunedModel, TunedModel.id == Checkpoint.model_id)
        .where(Checkpoint.job_id == job_id, TunedModel.deleted_at.is_(None))
    )

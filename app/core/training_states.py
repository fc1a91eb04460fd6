"""What a job needs to go on exactly where it was: checkpoints that still hold their training state.

Two are kept of a job that is not finished, so that one damaged folder costs one interval; none of a
finished one: optimizer states are twice as large as the weights they belong to.
"""

from __future__ import annotations

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from app.core.manifest import TRAINING_STATE
from app.core.status import FINAL
from app.core.storage import Storage
from app.core.tables import Checkpoint, Job, TunedModel

KEPT = 2


def resume_keys(session: Session, job_id: str) -> list[str]:
    """Storage keys of the checkpoints a job can go on from, the newest first."""
    query = (
        select(TunedModel.storage_key)
        .join(Checkpoint, Checkpoint.model_id == TunedModel.id)
        .where(Checkpoint.job_id == job_id, Checkpoint.resumable, TunedModel.deleted_at.is_(None))
        .order_by(Checkpoint.step_number.desc())
    )
    return list(session.scalars(query))


def drop_unneeded(session: Session, storage: Storage) -> int:
    """Remove the states nobody will go on from; returns how many.

    First the folder, then the row: a crash in between repeats the removal, and leaves nothing behind.
    """
    rows = session.execute(_unneeded().limit(100)).all()
    gone = [row for row in rows if storage.delete(row.storage_key, part=TRAINING_STATE)]
    for row in gone:
        row.Checkpoint.resumable = False
    return len(gone)


def _unneeded() -> Select[Checkpoint, str]:
    age = func.row_number().over(partition_by=Checkpoint.job_id, order_by=Checkpoint.step_number.desc())
    ranked = (
        select(Checkpoint.id, age.label("place"), Job.status)
        .join(Job, Job.id == Checkpoint.job_id)
        .where(Checkpoint.resumable)
        .subquery()
    )
    return (
        select(Checkpoint, TunedModel.storage_key)
        .join(ranked, ranked.c.id == Checkpoint.id)
        .join(TunedModel, TunedModel.id == Checkpoint.model_id)
        .where((ranked.c.place > KEPT) | ranked.c.status.in_(FINAL))
        .with_for_update(of=Checkpoint, skip_locked=True)
    )

"""Bytes in storage that no row names: what a process left that was killed between two of its steps.

A folder of an attempt, and weights it has published, may be removed once that attempt is over: nobody but
it writes there. A file is removed after an age that no upload reaches.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.core.attempts import Attempt
from app.core.status import JobStatus
from app.core.storage import Storage
from app.core.tables import File, Job, TunedModel


def drop(session: Session, storage: Storage, *, age_s: float) -> int:
    """Remove all of them; returns how many went."""
    return sum(storage.delete(key) for key in find(session, storage, age_s=age_s))


def find(session: Session, storage: Storage, *, age_s: float) -> list[str]:
    """Storage keys of all of them.

    The order of the three looks matters. What is listed was made by an attempt already claimed; one not
    running after that is over; what it has named by then is all it will ever name.
    """
    listed = {place: storage.names(place) for place in ("attempts", "weights", "files")}
    running = select(Job.id, Job.attempt).where(Job.status == JobStatus.RUNNING)
    alive = {Attempt(row.id, row.attempt) for row in session.execute(running)}
    named = set(session.scalars(select(TunedModel.storage_key).where(TunedModel.purged_at.is_(None))))
    return [
        *_ended("attempts", listed["attempts"], alive),
        *(key for key in _ended("weights", listed["weights"], alive) if key not in named),
        *(key for key in _unnamed_files(session, listed["files"]) if storage.age_s(key) > age_s),
    ]


def _ended(place: str, names: Iterable[str], alive: Container[Attempt]) -> list[str]:
    """Keys that belong to an attempt which is over."""
    attempts = [(name, Attempt.of_folder(name)) for name in names]
    return [f"{place}/{name}" for name, attempt in attempts if attempt is not None and attempt not in alive]


def _unnamed_files(session: Session, names: Iterable[str]) -> list[str]:
    named = set(session.scalars(select(File.storage_key).where(File.purged_at.is_(None))))
    return [f"files/{name}" for name in names if f"files/{name}" not in named]

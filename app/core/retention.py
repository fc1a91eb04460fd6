"""How long stored answers are kept: so many days, and so many bytes of a project, the oldest first to go.

Knows of an answer only whose it is, how old and how large.
"""

from __future__ import annotations

import json
from datetime import timedelta

from sqlalchemy import CursorResult, Select, delete, func, select
from sqlalchemy.orm import Session

from app.core.db import utc_now
from app.core.settings import Settings
from app.core.tables import Stored, StoredCompletion, StoredResponse

MOST = 10_000  # rows of one statement; the rest goes in the next round
TABLES: tuple[type[Stored], ...] = (StoredCompletion, StoredResponse)


def json_size(*values: object) -> int:
    """How many bytes of JSON these are, about: enough to add up what a project stores."""
    return sum(len(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")) for value in values)


def drop_old(session: Session, settings: Settings) -> int:
    """Remove what is past its time or has no room; returns how many rows went."""
    gone = 0
    for table in TABLES:
        past = table.created_at < utc_now() - timedelta(days=settings.stored_days)
        gone += _drop(session, table, select(table.id).where(past))
        for project_id in session.scalars(_too_large(table, settings.max_stored_bytes)).all():
            gone += _drop(session, table, _excess(table, project_id, settings.max_stored_bytes))
    return gone


def _too_large(table: type[Stored], most: int) -> Select[str]:
    """Projects that store more than they may."""
    return select(table.project_id).group_by(table.project_id).having(func.sum(table.size_bytes) > most)


def _excess(table: type[Stored], project_id: str, most: int) -> Select[str]:
    """Rows for which the newer ones of the project leave no room."""
    newest = (table.created_at.desc(), table.id.desc())
    held = func.sum(table.size_bytes).over(order_by=newest)
    rows = select(table.id, held.label("held")).where(table.project_id == project_id).subquery()
    return select(rows.c.id).where(rows.c.held > most)


def _drop(session: Session, table: type[Stored], ids: Select[str]) -> int:
    result = session.execute(delete(table).where(table.id.in_(ids.limit(MOST))))
    assert isinstance(result, CursorResult)
    return result.rowcount

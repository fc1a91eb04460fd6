"""Chat completions that are kept because their request said `store`: keep, get, list, change, delete.

Knows neither HTTP nor what a completion holds beyond its id, model and messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from sqlalchemy import Select, select
from sqlalchemy.orm import Session, load_only

from app.core.errors import NotFound
from app.core.pages import Cursor, Page, read_page
from app.core.retention import json_size
from app.core.tables import StoredCompletion

MAX_PAGE_BYTES = 16 * 2**20  # of JSON in one page of a list


@dataclass(frozen=True, slots=True)
class NewCompletion:
    """A whole completion: the request's messages and options, and the answer as it is sent."""

    request: dict[str, Any]
    response: dict[str, Any]
    metadata: dict[str, str] | None


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which completions a list shall have: of a model, with all these pairs of metadata or without any."""

    model: str | None = None
    metadata: dict[str, str] | None = None
    without_metadata: bool = False


def keep_completion(session: Session, *, project_id: str, new: NewCompletion) -> StoredCompletion:
    """Add the row."""
    row = StoredCompletion(
        id=new.response["id"],
        project_id=project_id,
        model=new.response["model"],
        request=new.request,
        response=new.response,
        user_metadata=new.metadata or None,
        size_bytes=json_size(new.request, new.response),
    )
    session.add(row)
    session.flush()
    return row


def get_completion(
    session: Session, *, project_id: str, completion_id: str, lock: bool = False
) -> StoredCompletion:
    """A stored completion of the project."""
    query = _of(project_id).where(StoredCompletion.id == completion_id)
    row = session.scalar(query.with_for_update() if lock else query)
    if row is None:
        raise NotFound(
            f"No such chat completion: {completion_id[:80]}. Only those created with 'store': true are kept.",
            param="completion_id",
        )
    return row


def list_completions(
    session: Session, *, project_id: str, wanted: Wanted, cursor: Cursor
) -> Page[StoredCompletion]:
    """Stored completions of the project; fewer than asked for where they are large."""
    query = _of(project_id)
    if wanted.model is not None:
        query = query.where(StoredCompletion.model == wanted.model)
    if wanted.without_metadata:
        query = query.where(StoredCompletion.user_metadata.is_(None))
    elif wanted.metadata:
        query = query.where(StoredCompletion.user_metadata.contains(wanted.metadata))
    keys = (StoredCompletion.created_at, StoredCompletion.id)
    slim = query.options(load_only(*keys, StoredCompletion.size_bytes, raiseload=True))
    page = read_page(session, slim, keys=keys, cursor=cursor)
    fitting = _fitting(page.data)
    whole = select(StoredCompletion).where(StoredCompletion.id.in_(fitting))
    rows = {row.id: row for row in session.scalars(whole, execution_options={"populate_existing": True})}
    return Page([rows[id] for id in fitting if id in rows], page.has_more or len(fitting) < len(page.data))


def _fitting(rows: Sequence[StoredCompletion]) -> list[str]:
    """As many of the rows as may be in memory together, but one at least."""
    sizes = accumulate(row.size_bytes for row in rows)
    held = zip(rows, sizes, strict=True)
    return [row.id for number, (row, size) in enumerate(held) if number == 0 or size <= MAX_PAGE_BYTES]


def change_metadata(
    session: Session, *, project_id: str, completion_id: str, metadata: dict[str, str] | None
) -> StoredCompletion:
    """Put other metadata in place of the old; None removes it."""
    row = get_completion(session, project_id=project_id, completion_id=completion_id, lock=True)
    row.user_metadata = metadata or None
    return row


def delete_completion(session: Session, *, project_id: str, completion_id: str) -> str:
    """Remove the row with all it holds."""
    row = get_completion(session, project_id=project_id, completion_id=completion_id, lock=True)
    session.delete(row)
    return row.id


def _of(project_id: str) -> Select[StoredCompletion]:
    return select(StoredCompletion).where(StoredCompletion.project_id == project_id)

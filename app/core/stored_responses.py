"""Responses that are kept: to get, to delete, and to go on from. A chain of them is one conversation.

Knows neither HTTP nor what stands in an item.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, literal, select
from sqlalchemy.orm import Session, aliased

from app.core.errors import InvalidRequest, NotFound
from app.core.retention import json_size
from app.core.tables import StoredResponse

MAX_CHAIN = 1000  # responses of one conversation
Item = dict[str, Any]


@dataclass(frozen=True, slots=True)
class NewResponse:
    """A whole response as it is sent, and the items of its own input."""

    response: dict[str, Any]
    input_items: list[Item]


def keep_response(session: Session, *, project_id: str, new: NewResponse) -> StoredResponse:
    """Add the row."""
    row = StoredResponse(
        id=new.response["id"],
        project_id=project_id,
        model=new.response["model"],
        response=new.response,
        previous_response_id=new.response["previous_response_id"],
        input_items=new.input_items,
        size_bytes=json_size(new.response, new.input_items),
    )
    session.add(row)
    session.flush()
    return row


def get_response(
    session: Session, *, project_id: str, response_id: str, lock: bool = False
) -> StoredResponse:
    """A stored response of the project."""
    query = _of(project_id).where(StoredResponse.id == response_id)
    row = session.scalar(query.with_for_update() if lock else query)
    if row is None:
        raise NotFound(f"Response with id '{response_id[:80]}' not found.", param="response_id")
    return row


def delete_response(session: Session, *, project_id: str, response_id: str) -> str:
    """Remove the row with all it holds; what goes on from it can be read and no longer gone on from."""
    row = get_response(session, project_id=project_id, response_id=response_id, lock=True)
    session.delete(row)
    return row.id


def read_past(session: Session, *, project_id: str, response_id: str, most_bytes: int) -> list[Item]:
    """Everything said up to the end of a response, oldest first. Raises InvalidRequest where part of it is
    gone, or all together is more than `most_bytes`.
    """
    rows = _read_chain(session, project_id=project_id, response_id=response_id, most_bytes=most_bytes)
    missing = rows[0].previous_response_id if rows else response_id
    if missing is not None:
        raise InvalidRequest(
            f"Previous response with id '{missing[:80]}' not found. It was deleted, is past its time, or was "
            "never stored. Send what was said as 'input' instead.",
            code="previous_response_not_found",
            param="previous_response_id",
        )
    return [item for row in rows for item in (*row.input_items, *row.response["output"])]


def read_input(session: Session, *, project_id: str, response_id: str, most_bytes: int) -> list[Item]:
    """The items a response was made from, oldest first, as far back as they are still there."""
    last = get_response(session, project_id=project_id, response_id=response_id)
    if last.previous_response_id is None:
        return last.input_items
    before = _read_chain(
        session, project_id=project_id, response_id=last.previous_response_id, most_bytes=most_bytes
    )
    return [item for row in before for item in (*row.input_items, *row.response["output"])] + last.input_items


def _read_chain(
    session: Session, *, project_id: str, response_id: str, most_bytes: int
) -> list[StoredResponse]:
    """The response and those it goes on from, oldest first."""
    columns = (StoredResponse.id, StoredResponse.previous_response_id, StoredResponse.size_bytes)
    mine = StoredResponse.project_id == project_id
    first = select(*columns, literal(0).label("depth")).where(mine, StoredResponse.id == response_id)
    chain = first.cte("chain", recursive=True)
    row = aliased(StoredResponse)
    earlier = (
        select(row.id, row.previous_response_id, row.size_bytes, chain.c.depth + 1)
        .join(chain, row.id == chain.c.previous_response_id)
        .where(row.project_id == project_id, chain.c.depth < MAX_CHAIN)
    )
    chain = chain.union_all(earlier)
    found = session.execute(select(chain.c.id, chain.c.size_bytes)).all()
    if len(found) > MAX_CHAIN or sum(one.size_bytes for one in found) > most_bytes:
        raise InvalidRequest(
            f"The conversation before this is longer than {MAX_CHAIN} responses or {most_bytes} bytes. "
            "Begin a new one.",
            code="context_length_exceeded",
            param="previous_response_id",
        )
    query = select(StoredResponse).join(chain, chain.c.id == StoredResponse.id).order_by(chain.c.depth.desc())
    return list(session.scalars(query))


def _of(project_id: str) -> Select[StoredResponse]:
    return select(StoredResponse).where(StoredResponse.project_id == project_id)

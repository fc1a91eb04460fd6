"""Cursor pages: some rows, and whether more follow. Knows no table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sqlalchemy import Select, tuple_
from sqlalchemy.orm import InstrumentedAttribute, Session

from app.core.errors import InvalidRequest

Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class Page(Generic[Row]):
    """Rows in the order asked for."""

    data: Sequence[Row]
    has_more: bool


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where a page begins and how long it is."""

    after: str | None = None
    limit: int = 20
    ascending: bool = False


def read_page(
    session: Session, query: Select[Row], *, keys: Sequence[InstrumentedAttribute[Any]], cursor: Cursor
) -> Page[Row]:
    """One page of `query`, ordered by `keys`; the last key is the id that `after` names.

    The row behind `after` must itself be part of the query, so a foreign id is as unknown as none.
    """
    if cursor.after is not None:
        at = session.execute(query.with_only_columns(*keys).where(keys[-1] == cursor.after)).one_or_none()
        if at is None:
            raise _unknown(cursor.after)
        here, there = tuple_(*keys), tuple_(*at)
        query = query.where(here > there if cursor.ascending else here < there)
    order = [key.asc() if cursor.ascending else key.desc() for key in keys]
    rows = session.scalars(query.order_by(*order).limit(cursor.limit + 1)).all()
    return Page(rows[: cursor.limit], len(rows) > cursor.limit)


def cut_page(items: Sequence[Mapping[str, Any]], cursor: Cursor) -> Page[Mapping[str, Any]]:
    """One page of a whole list, oldest first, of things with an `id`."""
    ordered = list(items if cursor.ascending else reversed(items))
    if cursor.after is not None:
        ids = [item["id"] for item in ordered]
        if cursor.after not in ids:
            raise _unknown(cursor.after)
        ordered = ordered[ids.index(cursor.after) + 1 :]
    return Page(ordered[: cursor.limit], len(ordered) > cursor.limit)


def _unknown(after: str) -> InvalidRequest:
    return InvalidRequest(f"No such object to list after: {after[:80]}", param="after")

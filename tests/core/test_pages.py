"""Cursor pages over rows, also where timestamps are equal."""

from __future__ import annotations

import dataclasses

import pytest
from sqlalchemy import update

from app.core import files
from app.core.db import utc_now
from app.core.errors import InvalidRequest
from app.core.pages import Cursor, Page
from app.core.tables import File
from tests.core.rows import House, make_caller


def page(house: House, **cursor: object) -> Page[File]:
    at = Cursor(**cursor)  # type: ignore[arg-type]
    return files.list_files(house.session, project_id=house.caller.project_id, purpose=None, cursor=at)


@pytest.mark.parametrize("ascending", [False, True])
@pytest.mark.parametrize("limit", [1, 2, 3, 7])
def test_walking_shows_every_row_once_in_order_though_times_are_equal(
    house: House, ascending: bool, limit: int
) -> None:
    ids = sorted((house.file().id for _ in range(7)), reverse=not ascending)
    house.session.execute(update(File).values(created_at=utc_now()))
    house.session.commit()
    seen: list[str] = []
    more, after = True, None
    while more:
        got = page(house, after=after, limit=limit, ascending=ascending)
        seen += [file.id for file in got.data]
        more, after = got.has_more, seen[-1]
    assert len(set(seen)) == 7
    assert sorted(seen) == sorted(ids)
    collated = page(house, limit=100, ascending=ascending)
    assert seen == [file.id for file in collated.data]
    assert seen == list(reversed([f.id for f in page(house, limit=100, ascending=not ascending).data]))


def test_has_more_is_exact_at_the_edge(house: House) -> None:
    for _ in range(3):
        house.file()
    assert page(house, limit=3).has_more is False
    assert page(house, limit=2).has_more is True
    last = page(house, limit=3).data[-1].id
    assert page(house, after=last).data == []


def test_rows_that_come_later_do_not_shift_a_walk(house: House) -> None:
    first = [house.file().id for _ in range(4)]
    top = page(house, limit=2)
    house.file()
    rest = page(house, after=top.data[-1].id, limit=10)
    assert [file.id for file in [*top.data, *rest.data]] == list(reversed(first))


@pytest.mark.parametrize("after", ["file-none", "", "a\0b", "x" * 5000])
def test_an_unknown_after_is_refused(house: House, after: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        page(house, after=after)
    assert caught.value.param == "after"


def test_a_foreign_or_deleted_after_is_as_unknown_as_none(house: House) -> None:
    other = dataclasses.replace(house, caller=make_caller(house.session, "two"))
    foreign, deleted = other.file(), house.file()
    files.delete_file(house.session, house.storage, project_id=house.caller.project_id, file_id=deleted.id)
    house.session.commit()
    for after in (foreign.id, deleted.id):
        with pytest.raises(InvalidRequest, match="No such object to list after"):
            page(house, after=after)

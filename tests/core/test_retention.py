"""How long stored answers are kept: by age, and by what a project may hold."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from app.core import retention
from app.core.db import utc_now
from app.core.settings import Settings
from app.core.stored_completions import NewCompletion, keep_completion
from app.core.tables import Project, StoredCompletion
from tests.core.installation import Installation
from tests.factories import make_project


def keep(session: Session, project: Project, id: str, *, age: timedelta = timedelta(0)) -> int:
    """Store a completion of some age; returns its size."""
    request: dict[str, Any] = {"messages": [{"role": "user", "content": "x" * 1000}], "options": {}}
    new = NewCompletion(request, {"id": id, "model": "m"}, None)
    row = keep_completion(session, project_id=project.id, new=new)
    row.created_at = utc_now() - age
    session.flush()
    return row.size_bytes


def kept(session: Session) -> set[str]:
    return set(session.scalars(select(StoredCompletion.id)))


def test_answers_past_their_time_go(session: Session) -> None:
    project, _ = make_project(session)
    for days in (0, 1, 2, 3):
        keep(session, project, f"day-{days}", age=timedelta(days=days, minutes=-1))
    assert retention.drop_old(session, Settings(stored_days=2)) == 1
    assert kept(session) == {"day-0", "day-1", "day-2"}
    assert retention.drop_old(session, Settings(stored_days=2)) == 0


def test_beyond_its_room_a_project_loses_its_oldest_and_no_other_project_any(session: Session) -> None:
    large, _ = make_project(session, name="large")
    small, _ = make_project(session, name="small")
    for minute in range(5):
        size = keep(session, large, f"large-{minute}", age=timedelta(minutes=minute))
    keep(session, small, "small", age=timedelta(days=1))
    assert size > 1000
    settings = Settings(max_stored_bytes=3 * size + 10)
    assert retention.drop_old(session, settings) == 2
    assert kept(session) == {"large-0", "large-1", "large-2", "small"}
    session.execute(update(StoredCompletion).values(size_bytes=10 * size))
    assert retention.drop_old(session, settings) == 4


def test_answers_that_nobody_removed_in_time_are_noted_by_fsck(installation: Installation) -> None:
    session = installation.house.session
    project = session.get_one(Project, installation.house.caller.project_id)
    keep(session, project, "old", age=timedelta(days=31))
    session.commit()
    assert installation.told() == []
    assert installation.told(strict=True) == [("I10", "kept longer than 30 days")]
    assert retention.drop_old(session, Settings()) == 1
    session.commit()
    assert installation.told(strict=True) == []

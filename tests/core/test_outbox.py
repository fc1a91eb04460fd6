"""Actions after the commit: never before it, never after a rollback, once."""

from __future__ import annotations

import logging

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session, sessionmaker

from app.core.db import transaction
from app.core.outbox import after_commit

ONE = text("SELECT 1")


def test_actions_run_once_in_order_after_the_commit(session: Session) -> None:
    said: list[str] = []
    session.execute(ONE)
    after_commit(session, lambda: said.append("a"))
    after_commit(session, lambda: said.append("b"))
    session.flush()
    assert said == []
    session.commit()
    assert said == ["a", "b"]
    session.execute(ONE)
    session.commit()
    assert said == ["a", "b"]


@pytest.mark.parametrize("end", ["rollback", "close"])
def test_nothing_runs_after_a_rollback_or_a_close(session: Session, end: str) -> None:
    said: list[str] = []
    session.execute(ONE)
    after_commit(session, lambda: said.append("a"))
    getattr(session, end)()
    session.execute(ONE)
    session.commit()
    assert said == []


def test_nothing_runs_when_the_block_raises(sessions: sessionmaker[Session]) -> None:
    said: list[str] = []

    def work() -> None:
        with transaction(sessions) as session:
            after_commit(session, lambda: said.append("a"))
            raise ValueError

    with pytest.raises(ValueError):
        work()
    assert said == []


def test_a_savepoint_takes_only_its_own_actions_with_it(session: Session) -> None:
    said: list[str] = []
    session.execute(ONE)
    after_commit(session, lambda: said.append("before"))
    with session.begin_nested():
        after_commit(session, lambda: said.append("kept"))
    assert said == []
    savepoint = session.begin_nested()
    after_commit(session, lambda: said.append("undone"))
    with session.begin_nested():
        after_commit(session, lambda: said.append("inner"))
    savepoint.rollback()
    after_commit(session, lambda: said.append("after"))
    session.commit()
    assert said == ["before", "kept", "after"]


def test_an_action_that_fails_keeps_no_other_from_running(
    session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    said: list[str] = []
    session.execute(ONE)
    after_commit(session, lambda: 1 / 0)
    after_commit(session, lambda: said.append("b"))
    with caplog.at_level(logging.WARNING):
        session.commit()
    assert said == ["b"]
    assert "housekeeping will repeat it" in caplog.text

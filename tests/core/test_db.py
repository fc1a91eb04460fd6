"""Which failures of the database pass by themselves, so that a worker tries again, and which are bugs."""

from __future__ import annotations

import time

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from app.core.db import is_away


@pytest.mark.parametrize(
    ("setting", "statement", "passes"),
    [
        ("transaction_read_only = on", "DELETE FROM jobs", True),
        ("idle_in_transaction_session_timeout = 1", "SELECT 1", True),
        ("statement_timeout = 1", "SELECT pg_sleep(1)", True),
        ("statement_timeout = 0", "SELECT 1 / 0", False),
        ("statement_timeout = 0", "SELECT nothing", False),
    ],
)
def test_what_passes_by_itself_is_told_from_a_bug(
    session: Session, setting: str, statement: str, passes: bool
) -> None:
    session.execute(text(f"SET LOCAL {setting}"))
    time.sleep(0.05)
    with pytest.raises(DBAPIError) as raised:
        session.execute(text(statement))
    assert is_away(raised.value) is passes

"""Things to do after the commit, never before it and never after a rollback."""

from __future__ import annotations

import logging
from collections.abc import Callable

from sqlalchemy import event
from sqlalchemy.orm import Session

log = logging.getLogger(__name__)
_KEY = "luthier_after_commit"


def after_commit(session: Session, action: Callable[[], object]) -> None:
    """Run `action` once this session has committed. It must be safe to lose: a crash can skip it."""
    session.info.setdefault(_KEY, []).append(action)


@event.listens_for(Session, "after_commit")
def _run(session: Session) -> None:
    if session.in_nested_transaction():
        return
    for action in session.info.pop(_KEY, []):
        try:
            action()
        except Exception:  # the row is committed; housekeeping repeats what was lost here
            log.warning("an action after the commit failed; housekeeping will repeat it", exc_info=True)


@event.listens_for(Session, "after_rollback")
def _drop(session: Session) -> None:
    session.info.pop(_KEY, None)

"""Things to do after the commit, never before it and never after a rollback."""

from __future__ import annotations

import logging
from collections.abc import Callable

from sqlalchemy import event
from sqlalchemy.orm import Session, SessionTransaction

log = logging.getLogger(__name__)
_KEY = "luthier_after_commit"
_MARKS = "luthier_savepoints"  # how many actions there were when each savepoint began


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


@event.listens_for(Session, "after_transaction_create")
def _mark(session: Session, transaction: SessionTransaction) -> None:
    if transaction.nested:
        session.info.setdefault(_MARKS, {})[transaction] = len(session.info.get(_KEY, []))


@event.listens_for(Session, "after_soft_rollback")
def _undo(session: Session, transaction: SessionTransaction) -> None:
    if transaction.nested:
        del session.info.get(_KEY, [])[session.info.get(_MARKS, {}).get(transaction, 0) :]


@event.listens_for(Session, "after_transaction_end")
def _forget(session: Session, transaction: SessionTransaction) -> None:
    if transaction.parent is None:  # a rollback or a close; a commit has run them by now
        session.info.pop(_KEY, None)
        session.info.pop(_MARKS, None)

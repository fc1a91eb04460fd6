"""Requests that create something at most once: the answer is kept under the client's key, with what it made.

Both are written in one transaction, so a key without its thing, or a thing without its key, cannot be. Knows
neither HTTP nor what is made.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import CursorResult, delete, func, select
from sqlalchemy.orm import Session

from app.core.db import utc_now
from app.core.errors import InvalidRequest, KeyInUse, KeyReused
from app.core.settings import Settings
from app.core.tables import IdempotencyKey

MAX_KEY_LENGTH = 255


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as its key remembers it: whose, under which key, and a digest of all it says."""

    project_id: str
    key: str
    fingerprint: str


def check_key(key: str) -> str:
    """The key, if it can be one; raises InvalidRequest."""
    if not (1 <= len(key) <= MAX_KEY_LENGTH and key.isascii() and key.isprintable()):
        raise InvalidRequest(
            f"The header Idempotency-Key must hold 1 to {MAX_KEY_LENGTH} printable ASCII characters.",
            code="invalid_idempotency_key",
        )
    return key


def fingerprint(*parts: str) -> str:
    """One digest of several texts; where one ends and the next begins counts too."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def find_answer(session: Session, asked: Asked) -> dict[str, Any] | None:
    """What the same request was answered before. None: it is the first; the key is held until the end of
    this transaction, and `keep_answer` shall follow.

    Raises KeyInUse while another transaction holds the key, KeyReused when it stands for another request.
    """
    held = select(func.pg_try_advisory_xact_lock(_lock_number(asked)))
    if not session.scalar(held):
        raise KeyInUse(
            "Another request with the same Idempotency-Key is still being worked on. Try again in a second."
        )
    row = session.get(IdempotencyKey, (asked.project_id, asked.key))
    if row is None:
        return None
    if row.fingerprint != asked.fingerprint:
        raise KeyReused(
            "This Idempotency-Key was used before for a request with another path or body. "
            "Use a new key for a new request."
        )
    return row.response


def keep_answer(session: Session, asked: Asked, response: dict[str, Any]) -> None:
    """Remember the answer, in the transaction that makes what it speaks of."""
    session.add(
        IdempotencyKey(
            project_id=asked.project_id, key=asked.key, fingerprint=asked.fingerprint, response=response
        )
    )
    session.flush()


def forget_old(session: Session, settings: Settings) -> int:
    """Remove keys past their time; returns how many."""
    before = utc_now() - timedelta(hours=settings.idempotency_hours)
    result = session.execute(delete(IdempotencyKey).where(IdempotencyKey.created_at < before))
    assert isinstance(result, CursorResult)
    return result.rowcount


def _lock_number(asked: Asked) -> int:
    """Number of the advisory lock: two keys that share one only make a client come back a second later."""
    digest = hashlib.sha256(f"{asked.project_id}\0{asked.key}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)

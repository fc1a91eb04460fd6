"""I10: nothing lies in storage that no row needs: weights, folders of attempts, half-written files.

A folder of `weights/` or `attempts/` is named after its attempt, so whether somebody may still be at
it is known exactly, and no age has to be guessed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path

from sqlalchemy import func, inspect, select
from sqlalchemy.orm import Session

from app.core import retention
from app.core.attempts import Attempt
from app.core.db import utc_now
from app.core.fsck.files import orphan
from app.core.fsck.finding import (
    HOUSEKEEPING,
    Finding,
    Severity,
    Site,
    age_s,
    names_in,
    remove,
)
from app.core.housekeeping import STALE_S
from app.core.status import JobStatus
from app.core.tables import IdempotencyKey, Job, TunedModel

LEAVING_S = 10  # within which a cancel frees the device


def check_weights(site: Site) -> Iterator[Finding]:
    """Every folder below `weights/` is needed by a name that is not purged, or is being published."""
    now = time.time()
    names = names_in(site.storage.root / "weights")  # first: what is published later has a row by then
    with site.snapshot() as session:
        needed = set(session.scalars(select(TunedModel.storage_key).where(TunedModel.purged_at.is_(None))))
        running = _running(session)
    for name in names:
        key = f"weights/{name}"
        if key in needed:
            continue
        attempt = Attempt.of_folder(name)
        young = age_s(site.storage.root / key, now) < site.orphan_age_s
        busy = young if attempt is None else attempt in running
        yield orphan(site, key, old=not busy, repair=partial(_drop_weights, site=site, key=key))


def check_attempts(site: Site) -> Iterator[Finding]:
    """Every folder below `attempts/` belongs to an attempt that runs, or that was ended a moment ago."""
    now = time.time()
    names = names_in(site.storage.root / "attempts")
    with site.snapshot() as session:
        running, leaving = _running(session), _leaving(session)
    for name in names:
        attempt = Attempt.of_folder(name)
        if attempt in running:
            continue
        key = f"attempts/{name}"
        young = age_s(site.storage.root / key, now) < site.orphan_age_s
        old = not young if attempt is None else attempt not in leaving
        yield orphan(site, key, old=old, repair=partial(_drop_attempt, site=site, key=key))


def check_unpublished(site: Site) -> Iterator[Finding]:
    """Files below `tmp/` are being written; one that nobody has touched for long has lost its writer."""
    now = time.time()
    for name in names_in(site.storage.root / "tmp"):
        path = site.storage.root / "tmp" / name
        if age_s(path, now) > STALE_S:
            repair = partial(_drop_unpublished, path=path)
            yield Finding("I10", f"tmp/{name}", "unfinished and abandoned", "delete it", repair=repair)
        else:
            cure = f"nothing: it is removed once untouched for {STALE_S // 3600} h"
            problem = "unfinished, an upload in progress or its remains"
            yield Finding("I10", f"tmp/{name}", problem, cure, Severity.WARNING)


def check_idempotency(site: Site) -> Iterator[Finding]:
    """Answers kept for repeated requests go once they are past their time."""
    past = utc_now() - timedelta(hours=site.settings.idempotency_hours, minutes=5)
    with site.snapshot() as session:
        old = session.scalar(select(IdempotencyKey.key).where(IdempotencyKey.created_at < past).limit(1))
    if old is not None:
        problem = f"kept longer than {site.settings.idempotency_hours:g} h"
        yield Finding("I10", "idempotency keys", problem, HOUSEKEEPING, Severity.WARNING)


def check_stored(site: Site) -> Iterator[Finding]:
    """Stored completions and responses go once they are past their time."""
    past = utc_now() - timedelta(days=site.settings.stored_days, hours=1)
    with site.snapshot() as session:
        for table in retention.TABLES:
            if session.scalar(select(table.id).where(table.created_at < past).limit(1)) is not None:
                problem = f"kept longer than {site.settings.stored_days:g} days"
                yield Finding("I10", str(inspect(table).local_table), problem, HOUSEKEEPING, Severity.WARNING)


def _running(session: Session) -> set[Attempt | None]:
    rows = session.execute(select(Job.id, Job.attempt).where(Job.status == JobStatus.RUNNING))
    return {Attempt(row.id, row.attempt) for row in rows}


def _leaving(session: Session) -> set[Attempt]:
    """Attempts whose job has just ended: a worker that was not asked has to notice, and to clear up."""
    since = func.clock_timestamp() - timedelta(seconds=LEAVING_S)
    rows = session.execute(select(Job.id, Job.attempt).where(Job.finished_at > since))
    return {Attempt(row.id, row.attempt) for row in rows}


def _is_running(session: Session, name: str) -> bool:
    """Whether the attempt a folder is named after still runs; its row is locked until the commit."""
    attempt = Attempt.of_folder(name)
    if attempt is None:
        return False
    mine = (Job.id == attempt.job_id, Job.attempt == attempt.number, Job.status == JobStatus.RUNNING)
    return session.scalar(select(Job.id).where(*mine).with_for_update()) is not None


def _drop_weights(session: Session, *, site: Site, key: str) -> bool:
    needed = select(TunedModel.id).where(TunedModel.storage_key == key, TunedModel.purged_at.is_(None))
    if _is_running(session, key.partition("/")[2]) or session.scalar(needed.limit(1)) is not None:
        return False
    return remove(site.storage.root / key)


def _drop_attempt(session: Session, *, site: Site, key: str) -> bool:
    return not _is_running(session, key.partition("/")[2]) and remove(site.storage.root / key)


def _drop_unpublished(_session: Session, *, path: Path) -> bool:
    return age_s(path, time.time()) > STALE_S and remove(path)

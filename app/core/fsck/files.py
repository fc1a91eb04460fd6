"""I1, I8: the bytes of every file are there as they came, and no bytes lie there without a row."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from app.core.db import utc_now
from app.core.fsck.finding import BUG, HOUSEKEEPING, Finding, Severity, Site, age_s, names_in, remove
from app.core.storage import Storage
from app.core.tables import File, Job


def check_files(site: Site) -> Iterator[Finding]:
    """I1, I8: every live file has its bytes, of the size and the digest of the upload."""
    columns = (File.id, File.storage_key, File.size_bytes, File.sha256)
    with site.snapshot() as session:
        rows = session.execute(select(*columns).where(File.deleted_at.is_(None))).all()
    for row in rows:
        problem = _damage(site, row.storage_key, size_bytes=row.size_bytes, sha256=row.sha256)
        if problem is not None:
            cure = f"bring {row.storage_key} back from a copy, or have its owner delete and upload it again"
            yield Finding("I8", row.id, problem, cure)


def check_named_files(site: Site) -> Iterator[Finding]:
    """I1: the files a job names still have their rows, be they deleted."""
    for column in (Job.training_file, Job.validation_file, Job.result_file):
        lost = (
            select(Job.id, column.label("file"))
            .outerjoin(File, File.id == column)
            .where(column.is_not(None), File.id.is_(None))
        )
        with site.snapshot() as session:
            for row in session.execute(lost):
                yield Finding("I1", row.id, f"its {column.key} {row.file} has no row", BUG)


def check_file_bytes(site: Site) -> Iterator[Finding]:
    """I10: no bytes below `files/` without a live row."""
    now = time.time()
    names = names_in(site.storage.root / "files")  # first: what is published later has a row by then
    with site.snapshot() as session:
        keys = dict(session.execute(select(File.storage_key, File.purged_at)).all())
        waiting = session.scalar(
            select(func.count()).where(File.deleted_at.is_not(None), File.purged_at.is_(None))
        )
    if waiting:
        yield Finding("I10", "deleted files", f"{waiting} with their bytes", HOUSEKEEPING, Severity.WARNING)
    for name in names:
        key = f"files/{name}"
        if key in keys and keys[key] is None:
            continue
        old = age_s(site.storage.root / key, now) >= site.orphan_age_s
        yield orphan(site, key, old=old, repair=partial(_drop_orphan, storage=site.storage, key=key))


def check_purges(site: Site) -> Iterator[Finding]:
    """Deleted files whose bytes are gone already only need their row to say so."""
    query = select(File.id, File.storage_key).where(File.deleted_at.is_not(None), File.purged_at.is_(None))
    with site.snapshot() as session:
        rows = session.execute(query).all()
    for row in rows:
        if not (site.storage.root / row.storage_key).exists():
            repair = partial(_mark_purged, file_id=row.id)
            cure = "mark it purged"
            yield Finding("I10", row.id, "deleted, its bytes gone", cure, Severity.WARNING, repair)


def orphan(site: Site, key: str, *, old: bool, repair: partial[bool]) -> Finding:
    """Bytes without a row: removed when old enough, else perhaps a publish in flight."""
    if old:
        return Finding("I10", key, "in storage, but no row needs it", "delete it", repair=repair)
    cure = f"delete it once it is older than {site.orphan_age_s:.0f} s"
    return Finding("I10", key, "in storage without a row, perhaps still being made", cure, Severity.WARNING)


def _damage(site: Site, key: str, *, size_bytes: int, sha256: str) -> str | None:
    try:
        path = site.storage.path(key)
        status = path.stat()
        if not path.is_file():
            return "in place of its bytes lies something that is no file"
        if status.st_size != size_bytes:
            return f"it has {status.st_size} bytes instead of {size_bytes}"
        if site.quick:
            return None
        mark = (key, status.st_mtime_ns, status.st_size, status.st_ino)
        if mark not in site.seen:
            site.seen[mark] = None if _digest(path) == sha256 else "its bytes have changed since the upload"
        return site.seen[mark]
    except FileNotFoundError:
        return "its bytes are gone"
    except ValueError:
        return f"its storage key {key[:80]!r} is none"
    except OSError as error:
        return f"its bytes cannot be read: {error.strerror}"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _drop_orphan(session: Session, *, storage: Storage, key: str) -> bool:
    known = select(File.id).where(File.storage_key == key, File.purged_at.is_(None))
    if session.scalar(known.limit(1)) is not None:
        return False
    return remove(storage.root / key)


def _mark_purged(session: Session, *, file_id: str) -> bool:
    change = update(File).where(File.id == file_id, File.deleted_at.is_not(None), File.purged_at.is_(None))
    return bool(session.scalar(change.values(purged_at=utc_now()).returning(File.id)))

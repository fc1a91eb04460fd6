"""Files of a project: create, find, list, delete. Bytes live in storage, under the id."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import ColumnElement, Select, func, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from app.core.db import utc_now
from app.core.errors import InvalidRequest, NotFound, TooLarge
from app.core.ids import Prefix, new_id
from app.core.outbox import after_commit
from app.core.pages import Cursor, Page, read_page
from app.core.status import FINAL
from app.core.storage import PendingFile, Storage
from app.core.tables import File, Job
from app.core.vocabulary import FileStatus, Purpose


@dataclass(frozen=True, slots=True)
class NewFile:
    """What the uploader said about the bytes."""

    filename: str
    purpose: Purpose
    expires_after_s: int | None = None


def create_file(
    session: Session, storage: Storage, *, project_id: str, new: NewFile, pending: PendingFile
) -> File:
    """Publish uploaded bytes and add their row. A row without bytes can never be committed."""
    now = utc_now()
    file_id = new_id(Prefix.FILE)
    row = File(
        id=file_id,
        project_id=project_id,
        filename=clean_filename(new.filename),
        purpose=new.purpose,
        size_bytes=pending.size_bytes,
        sha256=pending.sha256,
        status=FileStatus.PROCESSED,
        storage_key=f"files/{file_id}",
        created_at=now,
        expires_at=None if new.expires_after_s is None else now + timedelta(seconds=new.expires_after_s),
    )
    storage.publish(pending, row.storage_key)
    session.add(row)
    try:
        session.flush()
    except BaseException:
        storage.delete(row.storage_key)  # not after a failed commit: that one may have happened
        raise
    return row


def check_room(session: Session, *, project_id: str, max_bytes: int) -> None:
    """Refuse an upload when the project already holds as much as it may."""
    used = session.scalar(
        select(func.coalesce(func.sum(File.size_bytes), 0)).where(
            File.project_id == project_id, File.deleted_at.is_(None)
        )
    )
    if (used or 0) >= max_bytes:
        raise TooLarge(
            "This project's storage is used up. Delete files it no longer needs.", code="storage_quota"
        )


def get_file(session: Session, *, project_id: str, file_id: str, lock: bool = False) -> File:
    """A live file of the project. `lock` keeps it from being deleted until the commit."""
    query = _live(project_id).where(File.id == file_id)
    row = session.scalar(query.with_for_update(read=True) if lock else query)
    if row is None:
        raise NotFound(f"No such File object: {file_id[:80]}", param="id")
    return row


def list_files(session: Session, *, project_id: str, purpose: str | None, cursor: Cursor) -> Page[File]:
    """Live files of the project, newest first unless the cursor says other."""
    query = _live(project_id)
    if purpose is not None:
        if purpose not in list(Purpose):
            raise InvalidRequest(f"'{purpose[:40]}' is not a purpose.", param="purpose", code="invalid_value")
        query = query.where(File.purpose == Purpose(purpose))
    return read_page(session, query, keys=(File.created_at, File.id), cursor=cursor)


def delete_file(session: Session, storage: Storage, *, project_id: str, file_id: str) -> File:
    """Delete a file, unless a job that is not finished still needs it."""
    row = session.scalar(_live(project_id).where(File.id == file_id).with_for_update())
    if row is None:
        raise NotFound(f"No such File object: {file_id[:80]}", param="id")
    job_id = session.scalar(_jobs_in_need(file_id).limit(1))
    if job_id is not None:
        raise InvalidRequest(
            f"File {file_id} is in use by job {job_id}, which is not finished. "
            "Cancel the job or wait for its end.",
            code="file_in_use",
            param="id",
        )
    row.deleted_at = utc_now()
    after_commit(session, lambda: storage.delete(row.storage_key))
    return row


def expire_files(session: Session) -> int:
    """Mark files past their time as deleted, those in use excepted; returns how many."""
    due = session.scalars(
        select(File)
        .where(File.deleted_at.is_(None), File.expires_at < utc_now(), ~_in_need())
        .with_for_update(skip_locked=True)
        .limit(100)
    ).all()
    # Asked again under the lock: a job may have been committed between the two looks.
    free = [row for row in due if session.scalar(_jobs_in_need(row.id).limit(1)) is None]
    for row in free:
        row.deleted_at = utc_now()
    return len(free)


def purge_deleted(session: Session, storage: Storage) -> int:
    """Remove the bytes of deleted files; returns how many. Repeats what a crash left undone."""
    rows = session.scalars(
        select(File).where(File.deleted_at.is_not(None), File.purged_at.is_(None)).limit(100)
    ).all()
    gone = [row for row in rows if storage.delete(row.storage_key)]
    for row in gone:
        row.purged_at = utc_now()
    return len(gone)


def clean_filename(name: str) -> str:
    """A name for display: last part of a path, no control characters, at most 255 long."""
    last = name.replace("\\", "/").rsplit("/", 1)[-1]
    shown = "".join(c for c in last if c.isprintable()).strip()
    return shown[:255] or "upload"


def _live(project_id: str) -> Select[File]:
    return select(File).where(
        File.project_id == project_id,
        File.deleted_at.is_(None),
        (File.expires_at.is_(None)) | (File.expires_at > utc_now()),
    )


def _jobs_in_need(file_id: str | InstrumentedAttribute[str]) -> Select[str]:
    return select(Job.id).where(
        (Job.training_file == file_id) | (Job.validation_file == file_id), Job.status.not_in(FINAL)
    )


def _in_need() -> ColumnElement[bool]:
    return _jobs_in_need(File.id).correlate(File).exists()

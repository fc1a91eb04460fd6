"""The files a job names, and the error it ends with when one cannot be used."""

from __future__ import annotations

import errno
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.core.tables import File
from worker.context import Context


class JobInputError(Exception):
    """Something the job names is gone or cannot be used, as the job's error object."""

    def __init__(self, *, code: str, message: str, param: str) -> None:
        super().__init__(message)
        self.error: dict[str, str | None] = {"code": code, "message": message, "param": param}


def find_input(context: Context, session: Session, *, file_id: str, param: str) -> Path:
    """Where the bytes of a job's file lie; raises JobInputError, or OSError while the disk is away."""
    row = session.scalar(select(File).where(File.id == file_id, File.deleted_at.is_(None)))
    if row is not None:
        path = context.storage.path(row.storage_key)
        if path.exists():
            return path
        if not context.storage.is_there():
            raise OSError(errno.ENODEV, "the storage is not there")
    name = param.replace("_", " ")
    text = f"The {name} {file_id} no longer exists. Upload it again and create a new job"
    raise JobInputError(code="file_not_found", message=text, param=param)

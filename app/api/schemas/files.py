"""Files as they leave."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from app.api.schemas.lists import ListItem, PageQuery
from app.core.pages import Cursor
from app.core.tables import File


class FileObject(ListItem):
    """An uploaded file or the results of a job."""

    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: str
    expires_at: int | None = None
    status_details: str | None = None


class FileDeleted(BaseModel):
    """Confirmation that a file is gone."""

    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


class FilesQuery(PageQuery):
    """`order` is by `created_at`."""

    limit: int = Field(default=10_000, ge=1, le=10_000)
    order: Literal["asc", "desc"] = "desc"
    purpose: str | None = None

    def cursor(self) -> Cursor:
        """The page as core knows it."""
        return Cursor(self.after, self.limit, self.order == "asc")


def file_object(row: File) -> FileObject:
    """A row as the client sees it."""
    return FileObject(
        id=row.id,
        bytes=row.size_bytes,
        created_at=int(row.created_at.timestamp()),
        filename=row.filename,
        purpose=str(row.purpose),
        status=str(row.status),
        expires_at=None if row.expires_at is None else int(row.expires_at.timestamp()),
    )

"""/v1/files: upload, list, get, read, delete."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Annotated, BinaryIO
from urllib.parse import quote

from anyio import to_thread
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse

from app.api.context import Context
from app.api.dependencies import CallerDep, ContextDep, SessionDep
from app.api.once import Once, OnceDep
from app.api.schemas.fields import Id
from app.api.schemas.files import FileDeleted, FileObject, FilesQuery, file_object
from app.api.schemas.lists import ListObject, list_object
from app.api.upload import Upload, begin_upload
from app.core import files
from app.core.db import transaction
from app.core.errors import NotFound
from app.core.idempotency import fingerprint

router = APIRouter(prefix="/v1/files", tags=["files"])
PIECE_BYTES = 256 * 1024

_FORM = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string"},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2_592_000},
    },
}


@router.post(
    "",
    response_model=FileObject,
    openapi_extra={"requestBody": {"content": {"multipart/form-data": {"schema": _FORM}}, "required": True}},
)
async def create_file(request: Request, caller: CallerDep, context: ContextDep, once: OnceDep) -> Response:
    """Upload a file."""
    settings = context.settings
    upload = begin_upload(request, context.storage, max_file_bytes=settings.max_file_bytes)
    await to_thread.run_sync(_check_room, context, caller.project_id)
    try:
        await upload.read(request)
        publish = partial(_publish, context, upload, project_id=caller.project_id, once=once)
        return await to_thread.run_sync(publish)
    finally:
        await to_thread.run_sync(upload.discard)


def _check_room(context: Context, project_id: str) -> None:
    with context.sessions() as session:
        files.check_room(session, project_id=project_id, max_bytes=context.settings.max_project_storage_bytes)


def _publish(context: Context, upload: Upload, *, project_id: str, once: Once) -> Response:
    new, pending = upload.new_file(), upload.pending
    assert pending is not None

    def create() -> FileObject:
        return file_object(
            files.create_file(session, context.storage, project_id=project_id, new=new, pending=pending)
        )

    said = fingerprint(new.filename, new.purpose, str(new.expires_after_s), pending.sha256)
    with transaction(context.sessions) as session:
        return once(session, create, body_digest=said)


@router.get("")
def list_files(
    query: Annotated[FilesQuery, Query()], caller: CallerDep, session: SessionDep
) -> ListObject[FileObject]:
    """List files, newest first."""
    page = files.list_files(
        session, project_id=caller.project_id, purpose=query.purpose, cursor=query.cursor()
    )
    return list_object([file_object(row) for row in page.data], has_more=page.has_more)


@router.get("/{file_id}")
def retrieve_file(file_id: Id, caller: CallerDep, session: SessionDep) -> FileObject:
    """Get a file's object."""
    return file_object(files.get_file(session, project_id=caller.project_id, file_id=file_id))


@router.get("/{file_id}/content", response_class=StreamingResponse)
def retrieve_file_content(
    file_id: Id, caller: CallerDep, context: ContextDep, session: SessionDep
) -> StreamingResponse:
    """Read a file's bytes."""
    row = files.get_file(session, project_id=caller.project_id, file_id=file_id)
    try:
        file = context.storage.open(row.storage_key)
    except FileNotFoundError:  # deleted since the row was read, unless the disk itself is not there
        if not context.storage.is_there():
            raise
        raise NotFound(f"No such File object: {row.id}", param="id") from None
    headers = {
        "content-length": str(row.size_bytes),
        "content-disposition": f"attachment; filename*=UTF-8''{quote(row.filename, safe='')}",
        "x-content-type-options": "nosniff",
    }
    return StreamingResponse(_pieces(file), media_type="application/octet-stream", headers=headers)


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    with file:
        while piece := file.read(PIECE_BYTES):
            yield piece


@router.delete("/{file_id}")
def delete_file(file_id: Id, caller: CallerDep, context: ContextDep, session: SessionDep) -> FileDeleted:
    """Delete a file that no unfinished job needs."""
    row = files.delete_file(session, context.storage, project_id=caller.project_id, file_id=file_id)
    return FileDeleted(id=row.id)

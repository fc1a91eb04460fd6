"""/v1/chat/completions and below it: what was stored, to list, get, change and delete."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query

from app.api.body import JsonBody, json_request
from app.api.dependencies import CallerDep, SessionDep
from app.api.schemas.fields import Id
from app.api.schemas.lists import ListObject, OrderedQuery, list_object
from app.api.schemas.stored_completions import (
    ChangeCompletion,
    CompletionsQuery,
    StoredDeleted,
    StoredMessage,
    StoredObject,
    stored_messages,
    stored_object,
)
from app.core import stored_completions
from app.core.pages import cut_page

router = APIRouter(prefix="/v1/chat/completions", tags=["chat"])
ChangeBody = Annotated[ChangeCompletion, Depends(JsonBody(ChangeCompletion))]


@router.get("")
def list_chat_completions(
    query: Annotated[CompletionsQuery, Query()], caller: CallerDep, session: SessionDep
) -> ListObject[StoredObject]:
    """List stored completions, oldest first."""
    page = stored_completions.list_completions(
        session, project_id=caller.project_id, wanted=query.wanted(), cursor=query.cursor()
    )
    return list_object([stored_object(row) for row in page.data], has_more=page.has_more)


@router.get("/{completion_id}")
def retrieve_chat_completion(completion_id: Id, caller: CallerDep, session: SessionDep) -> StoredObject:
    """Get a stored completion."""
    return stored_object(
        stored_completions.get_completion(session, project_id=caller.project_id, completion_id=completion_id)
    )


@router.post("/{completion_id}", openapi_extra=json_request(ChangeCompletion))
def update_chat_completion(
    completion_id: Id, body: ChangeBody, caller: CallerDep, session: SessionDep
) -> StoredObject:
    """Give a stored completion other metadata."""
    row = stored_completions.change_metadata(
        session, project_id=caller.project_id, completion_id=completion_id, metadata=body.metadata
    )
    return stored_object(row)


@router.delete("/{completion_id}")
def delete_chat_completion(completion_id: Id, caller: CallerDep, session: SessionDep) -> StoredDeleted:
    """Delete a stored completion and its messages."""
    gone = stored_completions.delete_completion(
        session, project_id=caller.project_id, completion_id=completion_id
    )
    return StoredDeleted(id=gone)


@router.get("/{completion_id}/messages")
def list_chat_completion_messages(
    completion_id: Id, query: Annotated[OrderedQuery, Query()], caller: CallerDep, session: SessionDep
) -> ListObject[StoredMessage]:
    """List the messages a stored completion answers, first to last."""
    row = stored_completions.get_completion(
        session, project_id=caller.project_id, completion_id=completion_id
    )
    page = cut_page(stored_messages(row), query.cursor())
    return list_object([StoredMessage.model_validate(item) for item in page.data], has_more=page.has_more)

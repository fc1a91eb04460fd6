"""/v1/responses: create, whole or streamed; get, delete, and list the items a stored one was made from."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import JSONResponse, Response

from app.api.asking import ask, check_amounts
from app.api.body import JsonBody, json_request
from app.api.context import Context
from app.api.dependencies import CallerDep, ContextDep, SessionDep
from app.api.keeping import keep_whole
from app.api.leaving import EventStream, until_gone
from app.api.preparing import Conversation, Prepared, prepare
from app.api.replies import AnswerFailed
from app.api.response_items import Item, read_items, to_messages
from app.api.response_tools import read_format, read_offer, read_tools
from app.api.response_writer import ResponseWriter, collect, stream
from app.api.schemas.fields import Id
from app.api.schemas.lists import ListObject, list_object
from app.api.schemas.responses import (
    CreateResponse,
    ItemObject,
    ItemsQuery,
    ResponseDeleted,
    ResponseObject,
    ResponseQuery,
)
from app.core.db import transaction
from app.core.errors import InvalidRequest
from app.core.ids import Prefix, new_id
from app.core.pages import cut_page
from app.core.settings import Settings
from app.core.stored_responses import (
    NewResponse,
    delete_response,
    get_response,
    keep_response,
    read_input,
    read_past,
)

router = APIRouter(prefix="/v1/responses", tags=["responses"])
Body = Annotated[CreateResponse, Depends(JsonBody(CreateResponse))]


@dataclass(frozen=True, slots=True)
class _Begun:
    """A request that can be done, the items of its own input, and the fields of its response."""

    prepared: Prepared
    items: list[Item]
    frame: dict[str, Any]


@router.post("", openapi_extra=json_request(CreateResponse))
async def create_response(body: Body, request: Request, caller: CallerDep, context: ContextDep) -> Response:
    """Answer an input, whole or as a stream."""
    begun = await to_thread.run_sync(_begin, context, caller.project_id, body)
    writer = ResponseWriter(begun.frame)
    keep = partial(_keep, context, caller.project_id, begun.items) if begun.frame["store"] else None
    try:
        asked = await ask(context, request, [begun.prepared.ask])
    except AnswerFailed as error:  # an engine knows messages only
        error.param = "input" if error.param == "messages" else error.param
        raise
    words = begun.prepared.words(asked)
    if body.stream:
        return EventStream(stream(writer, words, keep), at_end=asked.close)
    try:
        whole = await until_gone(request.receive, collect(writer, words))
    finally:
        asked.close()
    if keep is not None:
        await keep_whole(whole, keep)
    return JSONResponse(whole)


def _begin(context: Context, project_id: str, body: CreateResponse) -> _Begun:
    """Refuse what cannot be done; the conversation is the past of the stored response, then the input."""
    body.refuse_unsupported()
    settings = context.settings
    check_amounts([("max_output_tokens", body.max_output_tokens or 16, settings.max_completion_tokens)])
    tools, items = read_tools(body.tools), read_items(body.input)
    past = [] if body.previous_response_id is None else _read_past(context, project_id, body)
    messages = to_messages(body.instructions, past, items)
    if len(messages) > settings.max_messages:
        text = f"Invalid 'input': array too long. The conversation may have {settings.max_messages} messages."
        raise InvalidRequest(text, code="array_above_max_length", param="input")
    asked = Conversation(
        id=new_id(Prefix.RESPONSE),
        model=body.model,
        messages=messages,
        sampling=body.sampling(),
        offer=read_offer(tools, body.tool_choice, parallel=body.parallel_tool_calls),
        format=read_format(body.text.format if body.text else None),
    )
    prepared = prepare(context, project_id, asked)
    head = {"id": asked.id, "object": "response", "created_at": int(time.time()), "model": prepared.model.id}
    return _Begun(prepared, items, head | body.frame(tools))


def _read_past(context: Context, project_id: str, body: CreateResponse) -> list[Item]:
    assert body.previous_response_id is not None
    with context.sessions() as session:
        return read_past(
            session,
            project_id=project_id,
            response_id=body.previous_response_id,
            most_bytes=_most_bytes(context.settings),
        )


def _most_bytes(settings: Settings) -> int:
    """How much of a conversation is read at once."""
    return 4 * settings.max_body_bytes


def _keep(context: Context, project_id: str, items: list[Item], whole: dict[str, Any]) -> None:
    with transaction(context.sessions) as session:
        keep_response(session, project_id=project_id, new=NewResponse(whole, items))


@router.get("/{response_id}")
def retrieve_response(
    response_id: Id, query: Annotated[ResponseQuery, Query()], caller: CallerDep, session: SessionDep
) -> ResponseObject:
    """Get a stored response."""
    query.refuse_unsupported()
    row = get_response(session, project_id=caller.project_id, response_id=response_id)
    return ResponseObject.model_validate(row.response)


@router.delete("/{response_id}")
def delete_stored_response(response_id: Id, caller: CallerDep, session: SessionDep) -> ResponseDeleted:
    """Delete a stored response and the items of its own input."""
    return ResponseDeleted(id=delete_response(session, project_id=caller.project_id, response_id=response_id))


@router.post("/{response_id}/cancel")
def cancel_response(response_id: Id, caller: CallerDep, session: SessionDep) -> ResponseObject:
    """Refused: only responses made in the background can be cancelled, and none is."""
    get_response(session, project_id=caller.project_id, response_id=response_id)
    raise InvalidRequest(
        "Only responses created with 'background': true can be cancelled, which is not supported here. "
        "A stream is cancelled by closing it.",
        code="unsupported_operation",
        param="response_id",
    )


@router.get("/{response_id}/input_items")
def list_input_items(
    response_id: Id,
    query: Annotated[ItemsQuery, Query()],
    caller: CallerDep,
    context: ContextDep,
    session: SessionDep,
) -> ListObject[ItemObject]:
    """List the items a response was made from, those of the responses before it too; newest first."""
    items = read_input(
        session,
        project_id=caller.project_id,
        response_id=response_id,
        most_bytes=_most_bytes(context.settings),
    )
    page = cut_page(items, query.cursor())
    return list_object([ItemObject.model_validate(item) for item in page.data], has_more=page.has_more)

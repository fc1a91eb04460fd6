"""/v1/chat/completions: everything that can be refused is refused first, then the words flow."""

from __future__ import annotations

import time
from functools import partial
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from app.api.answers import Answer, Frame, collect, stream
from app.api.asking import ask, check_amounts
from app.api.body import JsonBody, json_request
from app.api.context import Context
from app.api.dependencies import CallerDep, ContextDep
from app.api.formats import read_format, read_offer
from app.api.keeping import keep_whole, kept
from app.api.leaving import EventStream, until_gone
from app.api.preparing import Conversation, Prepared, prepare
from app.api.schemas.chat import CreateChatCompletion
from app.api.schemas.stored_completions import new_completion
from app.core.completions import Sampling
from app.core.db import transaction
from app.core.errors import InvalidRequest
from app.core.ids import Prefix, new_id
from app.core.messages import MessageError, check_messages, check_tools
from app.core.settings import Settings
from app.core.stored_completions import keep_completion

router = APIRouter(prefix="/v1/chat/completions", tags=["chat"])
Body = Annotated[CreateChatCompletion, Depends(JsonBody(CreateChatCompletion))]


@router.post("", openapi_extra=json_request(CreateChatCompletion))
async def create_chat_completion(
    body: Body, request: Request, caller: CallerDep, context: ContextDep
) -> Response:
    """Answer a conversation, whole or as a stream."""
    # In a thread: a long conversation takes milliseconds to check, and the session must not block.
    prepared = await to_thread.run_sync(_prepare, context, caller.project_id, body)
    n = prepared.ask.sampling.n
    metadata = body.metadata or {} if body.store else None
    frame = Frame(prepared.ask.id, int(time.time()), prepared.model.id, n, body.wants_usage, metadata)
    keep = partial(_keep, context, caller.project_id, body)
    asked = await ask(context, request, [prepared.ask])
    words = prepared.words(asked)
    if body.stream:
        words = kept(words, Answer(frame), keep) if body.store else words
        return EventStream(stream(frame, words), at_end=asked.close)
    try:
        answer = await until_gone(request.receive, collect(Answer(frame), words))
    finally:
        asked.close()
    whole = answer.as_json()
    if body.store:
        await keep_whole(whole, keep)
    return JSONResponse(whole)


def _keep(context: Context, project_id: str, body: CreateChatCompletion, whole: dict[str, Any]) -> None:
    with transaction(context.sessions) as session:
        keep_completion(session, project_id=project_id, new=new_completion(body, whole))


def check(body: CreateChatCompletion, settings: Settings) -> Sampling:
    """Refuse what this version does not do and what is too much; the rest as an engine takes it."""
    body.refuse_unsupported()
    limit = body.limit()
    named = "max_completion_tokens" if body.max_completion_tokens is not None else "max_tokens"
    check_amounts([("n", body.n or 1, settings.max_n), (named, limit or 1, settings.max_completion_tokens)])
    top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return Sampling(max_tokens=limit, top_logprobs=top_logprobs, **body.sampling())


def _check_conversation(body: CreateChatCompletion, settings: Settings) -> list[dict[str, Any]]:
    if len(body.messages) > settings.max_messages:
        text = f"Invalid 'messages': array too long. Expected at most {settings.max_messages} items."
        raise InvalidRequest(text, code="array_above_max_length", param="messages")
    try:
        messages = check_messages(body.messages)
    except MessageError as error:
        path = "messages" if error.index is None else f"messages[{error.index}]"
        param = f"{path}.{error.field}" if error.field else path
        text = f"Invalid '{path}': {error.text}."
        raise InvalidRequest(text, code="invalid_value", param=param) from None
    try:
        check_tools(body.tools or None)
    except MessageError as error:
        text = f"Invalid 'tools': {error.text}."
        raise InvalidRequest(text, code="invalid_value", param=error.field or "tools") from None
    return messages


def _prepare(context: Context, project_id: str, body: CreateChatCompletion) -> Prepared:
    sampling = check(body, context.settings)
    asked = Conversation(
        id=new_id(Prefix.COMPLETION),
        model=body.model,
        messages=_check_conversation(body, context.settings),
        sampling=sampling,
        offer=read_offer(body.tools, body.tool_choice, parallel=body.parallel_tool_calls),
        format=read_format(body.response_format),
    )
    return prepare(context, project_id, asked)

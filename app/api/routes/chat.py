"""/v1/chat/completions: everything that can be refused is refused first, then the words flow."""

from __future__ import annotations

import time
from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from app.api.answers import Frame, collect, stream
from app.api.body import JsonBody, json_request
from app.api.context import Context
from app.api.dependencies import CallerDep, ContextDep
from app.api.leaving import EventStream, until_gone
from app.api.replies import Reply
from app.api.schemas.chat import CreateChatCompletion
from app.core.completions import CompletionRequest, Sampling
from app.core.errors import InvalidRequest
from app.core.ids import Prefix, new_id
from app.core.messages import MessageError, check_messages, check_tools
from app.core.queue import Task, inference_queue
from app.core.served_models import ServedModel, resolve
from app.core.settings import Settings

router = APIRouter(prefix="/v1/chat/completions", tags=["chat"])
Body = Annotated[CreateChatCompletion, Depends(JsonBody(CreateChatCompletion))]
WORK_FACTOR = 8  # n × tokens of all choices may reach so many times the limit of one choice


@router.post("", openapi_extra=json_request(CreateChatCompletion))
async def create_chat_completion(
    body: Body, request: Request, caller: CallerDep, context: ContextDep
) -> Response:
    """Answer a conversation, whole or as a stream."""
    # In a thread: a long conversation takes milliseconds to check, and the session must not block.
    sampling, model = await to_thread.run_sync(_prepare, context, caller.project_id, body)
    await context.engines.require(model.base_model)
    ask = _completion_request(body, model, sampling, context=context, project_id=caller.project_id)
    frame = Frame(ask.id, int(time.time()), model.id, sampling.n, body.wants_usage)
    reply = context.replies.expect(ask.id, n=sampling.n)
    try:
        await until_gone(request.receive, _begin(context, ask, reply))
        words = reply.words(gap_s=context.settings.word_gap_s)
        if body.stream:
            return EventStream(stream(frame, words), at_end=reply.close)
        answer = await until_gone(request.receive, collect(frame, words))
    except BaseException:
        reply.close()
        raise
    reply.close()
    return JSONResponse(answer)


def check(body: CreateChatCompletion, settings: Settings) -> Sampling:
    """Refuse what this version does not do and what is too much; the rest as an engine takes it."""
    body.refuse_unsupported()
    limit, n = body.limit(), body.n or 1
    for name, value, most in (
        ("n", n, settings.max_n),
        ("max_completion_tokens", limit or 1, settings.max_completion_tokens),
    ):
        if value > most:
            param = name if getattr(body, name) is not None else "max_tokens"
            text = f"Invalid '{param}': integer above maximum value."
            text += f" Expected a value <= {most}, but got {value} instead."
            raise InvalidRequest(text, code="integer_above_max_value", param=param)
    _check_conversation(body, settings)
    top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return Sampling(max_tokens=limit, top_logprobs=top_logprobs, **body.sampling())


def _check_conversation(body: CreateChatCompletion, settings: Settings) -> None:
    if len(body.messages) > settings.max_messages:
        text = f"Invalid 'messages': array too long. Expected at most {settings.max_messages} items."
        raise InvalidRequest(text, code="array_above_max_length", param="messages")
    try:
        check_messages(body.messages)
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


def _check_work(sampling: Sampling, context: Context, model: ServedModel) -> None:
    entry = context.catalogue.find(model.base_model)
    longest = entry.context_length if entry else context.settings.max_completion_tokens
    tokens = min(sampling.max_tokens or longest, longest)
    most = WORK_FACTOR * context.settings.max_completion_tokens
    if sampling.n * tokens > most:
        raise InvalidRequest(
            f"Invalid 'n': {sampling.n} choices of up to {tokens} tokens are more than the {most} tokens "
            "one request may ask for. Lower 'n' or 'max_completion_tokens'.",
            code="invalid_value",
            param="n",
        )


def _prepare(context: Context, project_id: str, body: CreateChatCompletion) -> tuple[Sampling, ServedModel]:
    sampling = check(body, context.settings)
    with context.sessions() as session:
        model = resolve(session, context.catalogue, project_id=project_id, name=body.model)
    _check_work(sampling, context, model)
    return sampling, model


def _completion_request(
    body: CreateChatCompletion, model: ServedModel, sampling: Sampling, *, context: Context, project_id: str
) -> CompletionRequest:
    return CompletionRequest(
        id=new_id(Prefix.COMPLETION),
        project_id=project_id,
        base_model=model.base_model,
        tuned=model.tuned,
        messages=body.messages,
        tools=None if body.tool_choice == "none" else body.tools or None,
        sampling=sampling,
        reply_to=context.replies.stream,
        expires_at=time.time() + context.settings.first_word_s,
    )


async def _begin(context: Context, ask: CompletionRequest, reply: Reply) -> None:
    """Send the request and wait for the first words, so that a refusal can still be a status."""
    await to_thread.run_sync(_send, context, ask)
    await reply.wait(context.settings.first_word_s)


def _send(context: Context, ask: CompletionRequest) -> None:
    queue = inference_queue(ask.base_model)
    context.sender.send(Task.COMPLETE, queue, ask.model_dump(mode="json"))

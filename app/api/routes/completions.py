"""/v1/completions: plain text goes on, as before there was chat. No template, no roles."""

from __future__ import annotations

import time
from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from app.api.answers import Frame
from app.api.asking import ask, check_amounts, check_work, expires_at
from app.api.body import JsonBody, json_request
from app.api.context import Context
from app.api.dependencies import CallerDep, ContextDep
from app.api.leaving import EventStream, until_gone
from app.api.schemas.completions import DEFAULT_MAX_TOKENS, CreateCompletion
from app.api.texts import Texts
from app.core.completions import CompletionRequest, Sampling
from app.core.ids import Prefix, new_id
from app.core.served_models import resolve

router = APIRouter(prefix="/v1/completions", tags=["completions"])
Body = Annotated[CreateCompletion, Depends(JsonBody(CreateCompletion))]


@router.post("", openapi_extra=json_request(CreateCompletion))
async def create_completion(body: Body, request: Request, caller: CallerDep, context: ContextDep) -> Response:
    """Go on with one or more texts, whole or as a stream."""
    asks = await to_thread.run_sync(_prepare, context, caller.project_id, body)
    id = new_id(Prefix.TEXT_COMPLETION)
    frame = Frame(id, int(time.time()), body.model, body.made * len(asks), body.wants_usage)
    echoes = body.prompt if body.echo else ()
    texts = Texts(frame, made=body.made, kept=body.n or 1, echoes=echoes, shows=body.logprobs is not None)
    asked = await ask(context, request, asks)
    words = asked.all_words(n=body.made)
    if body.stream:
        return EventStream(texts.stream(words), at_end=asked.close)
    try:
        answer = await until_gone(request.receive, texts.collect(words))
    finally:
        asked.close()
    return JSONResponse(answer)


def _prepare(context: Context, project_id: str, body: CreateCompletion) -> list[CompletionRequest]:
    """One request for each prompt, or the refusal of all."""
    body.refuse_unsupported()
    settings = context.settings
    limit = body.max_tokens or DEFAULT_MAX_TOKENS
    named = "best_of" if body.best_of else "n"
    check_amounts([(named, body.made, settings.max_n), ("max_tokens", limit, settings.max_completion_tokens)])
    chosen = body.made > (body.n or 1)  # by their log-probabilities
    top_logprobs = 0 if chosen and body.logprobs is None else body.logprobs
    options = body.sampling() | {"n": body.made}
    sampling = Sampling(max_tokens=limit, top_logprobs=top_logprobs, **options)
    with context.sessions() as session:
        model = resolve(session, context.catalogue, project_id=project_id, name=body.model)
    entry = context.catalogue.find(model.base_model)
    check_work(settings, sampling, entry, prompts=len(body.prompt))
    return [
        CompletionRequest(
            id=new_id(Prefix.TEXT_COMPLETION),
            project_id=project_id,
            base_model=model.base_model,
            tuned=model.tuned,
            messages=[],
            prompt=prompt,
            sampling=sampling,
            reply_to=context.replies.stream,
            expires_at=expires_at(settings),
        )
        for prompt in body.prompt
    ]

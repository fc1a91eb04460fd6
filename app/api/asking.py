"""Sends requests to an engine and waits for their first words, so that a refusal can still be a status.

Knows the queue and the reply stream, nothing of what a client sent or how its answer will look.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress

from anyio import to_thread
from fastapi import Request

from app.api.context import Context
from app.api.leaving import until_gone
from app.api.replies import Reply
from app.core.base_models import BaseModelEntry
from app.core.completions import CompletionRequest, Failed, Sampling, Word
from app.core.errors import InvalidRequest, Unavailable
from app.core.queue import Task, inference_queue
from app.core.settings import Settings

OVERLOADED_RETRY_S = 2
WORK_FACTOR = 8  # n × tokens of all choices may reach so many times the limit of one choice


class Asked:
    """Requests that have begun to answer. `close` it whatever happens."""

    def __init__(self, context: Context, replies: Sequence[Reply]) -> None:
        self._gap_s = context.settings.word_gap_s
        self._replies = replies

    def words(self, number: int = 0) -> AsyncIterator[list[Word]]:
        """The words of one of the requests."""
        return self._replies[number].words(gap_s=self._gap_s)

    async def all_words(self, *, n: int) -> AsyncIterator[list[Word]]:
        """The words of all requests as they come; choices of request i have the indices from i × n."""
        streams = [self.words(number) for number in range(len(self._replies))]
        waiting = {asyncio.ensure_future(anext(stream)): i for i, stream in enumerate(streams)}
        try:
            while waiting:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    number = waiting.pop(task)
                    with suppress(StopAsyncIteration):
                        yield [_moved(word, number * n) for word in task.result()]
                        waiting[asyncio.ensure_future(anext(streams[number]))] = number
        finally:
            for task in waiting:
                task.cancel()

    def close(self) -> None:
        """Nobody reads any more; what is not finished is stopped."""
        for reply in self._replies:
            reply.close()


async def ask(context: Context, request: Request, asks: Sequence[CompletionRequest]) -> Asked:
    """Send requests for one base model; returns once each has its first words.

    Raises what an engine says, Unavailable when nobody has room or answers in time, ClientGone.
    """
    await context.engines.require(asks[0].base_model)
    replies = [context.replies.expect(one.id, n=one.sampling.n) for one in asks]
    asked = Asked(context, replies)
    try:
        await until_gone(request.receive, _begin(context, asks, replies))
    except BaseException:
        asked.close()
        raise
    return asked


async def _begin(context: Context, asks: Sequence[CompletionRequest], replies: Sequence[Reply]) -> None:
    await to_thread.run_sync(_send, context, asks)
    first_word_s = context.settings.first_word_s
    await asyncio.gather(*(reply.wait(first_word_s) for reply in replies))


def _send(context: Context, asks: Sequence[CompletionRequest]) -> None:
    queue = inference_queue(asks[0].base_model)
    # A list in the broker. Requests of the same instant do not see each other: the line is as long as the
    # limit and what arrives within one round trip.
    waiting = context.redis.llen(queue)
    if waiting + len(asks) > context.settings.max_waiting_requests:
        raise Unavailable(
            f"Too many requests wait for {asks[0].base_model} at the moment. Try again in a few seconds.",
            code="overloaded",
            retry_after_s=OVERLOADED_RETRY_S,
        )
    for one in asks:
        context.sender.send(Task.COMPLETE, queue, one.model_dump(mode="json"))


def _moved(word: Word, by: int) -> Word:
    if isinstance(word, Failed) or by == 0:
        return word
    return word.model_copy(update={"index": word.index + by})


def expires_at(settings: Settings) -> float:
    """When nobody waits any more for the first word of a request sent now; unix seconds."""
    return time.time() + settings.first_word_s


def check_amounts(amounts: Sequence[tuple[str, int, int]]) -> None:
    """Raise InvalidRequest for the first (field, value, limit) above its limit."""
    for param, value, most in amounts:
        if value > most:
            text = f"Invalid '{param}': integer above maximum value."
            text += f" Expected a value <= {most}, but got {value} instead."
            raise InvalidRequest(text, code="integer_above_max_value", param=param)


def check_work(
    settings: Settings, sampling: Sampling, entry: BaseModelEntry | None, *, prompts: int = 1
) -> None:
    """Raise InvalidRequest for more choices × tokens than one request may ask for."""
    longest = entry.context_length if entry else settings.max_completion_tokens
    tokens = min(sampling.max_tokens or longest, longest)
    most = WORK_FACTOR * settings.max_completion_tokens
    choices = sampling.n * prompts
    if choices * tokens > most:
        raise InvalidRequest(
            f"Invalid 'n': {choices} choices of up to {tokens} tokens are more than the {most} tokens one "
            "request may ask for. Ask for fewer choices or fewer tokens.",
            code="invalid_value",
            param="n",
        )

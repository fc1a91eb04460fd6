"""Words of an answer as a response: its items as they come, the events that tell of them, the whole object.

Whole and streamed answers are made by the same steps; who wants no events drops them.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

from app.api.answers import Usage, event
from app.api.calls import CallArguments, CallBegun, Said
from app.api.keeping import Keep, keep_whole
from app.api.response_items import text_part
from app.core.completions import Delta, Finished, FinishReason
from app.core.errors import ServiceError
from app.core.ids import Prefix, new_id

Event = dict[str, Any]


class _Message:
    """An item of text, open while its text comes."""

    def __init__(self, place: int) -> None:
        self.id = new_id(Prefix.MESSAGE)
        self.where = {"item_id": self.id, "output_index": place, "content_index": 0}
        self._text: list[str] = []
        self._logprobs: list[dict[str, Any]] = []

    def begun(self) -> list[Event]:
        return [{"type": "response.content_part.added", **self.where, "part": text_part("")}]

    def add(self, said: Delta) -> list[Event]:
        self._text.append(said.text)
        logprobs = [chance.model_dump(mode="json") for chance in said.logprobs or ()]
        self._logprobs += logprobs
        kind = "response.output_text.delta"
        return [{"type": kind, **self.where, "delta": said.text, "logprobs": logprobs}]

    def ended(self) -> list[Event]:
        part = self._part()
        done = {"type": "response.output_text.done", **self.where, "text": part["text"]}
        return [
            done | {"logprobs": self._logprobs},
            {"type": "response.content_part.done", **self.where, "part": part},
        ]

    def as_json(self, status: str) -> dict[str, Any]:
        content = [] if status == "in_progress" else [self._part()]
        return {"id": self.id, "type": "message", "status": status, "role": "assistant", "content": content}

    def _part(self) -> dict[str, Any]:
        return text_part("".join(self._text), logprobs=self._logprobs)


class _Call:
    """An item that calls a function, open while its arguments come."""

    def __init__(self, place: int, said: CallBegun) -> None:
        self.id = new_id(Prefix.FUNCTION_CALL)
        self.where = {"item_id": self.id, "output_index": place}
        self._said = said
        self._arguments: list[str] = []

    def begun(self) -> list[Event]:
        return []

    def add(self, said: CallArguments) -> list[Event]:
        self._arguments.append(said.text)
        return [{"type": "response.function_call_arguments.delta", **self.where, "delta": said.text}]

    def ended(self) -> list[Event]:
        said = {"arguments": "".join(self._arguments), "name": self._said.name}
        return [{"type": "response.function_call_arguments.done", **self.where, **said}]

    def as_json(self, status: str) -> dict[str, Any]:
        arguments = "" if status == "in_progress" else "".join(self._arguments)
        named = {"call_id": self._said.id, "name": self._said.name, "arguments": arguments}
        return {"id": self.id, "type": "function_call", "status": status, **named}


class ResponseWriter:
    """One response, from its first event to its last. `frame`: the fields that do not change."""

    def __init__(self, frame: dict[str, Any]) -> None:
        self._frame = frame
        self._sequence = 0
        self._output: list[dict[str, Any]] = []  # items that are whole
        self._open: _Message | _Call | None = None
        self._cut = False
        self._usage = Usage()

    def begin(self) -> list[Event]:
        """The events before any word."""
        kinds = ("response.created", "response.in_progress")
        return self._numbered({"type": kind, "response": self._as_json("in_progress")} for kind in kinds)

    def take(self, some: Sequence[Said]) -> list[Event]:
        """The events of some words."""
        events: list[Event] = []
        for said in some:
            if isinstance(said, Delta):
                events += self._text(said)
            elif isinstance(said, CallBegun):
                events += self._close("completed")
                events += self._begin(_Call(len(self._output), said))
            elif isinstance(said, CallArguments):
                assert isinstance(self._open, _Call)
                events += self._open.add(said)
            elif isinstance(said, Finished):
                events += self._finish(said)
        return self._numbered(events)

    def whole(self) -> dict[str, Any]:
        """The response, when all words have come."""
        done = self._as_json("incomplete" if self._cut else "completed") | {"usage": self._used()}
        if self._cut:
            return done | {"incomplete_details": {"reason": "max_output_tokens"}}
        return done | {"completed_at": int(time.time())}

    def end(self, whole: dict[str, Any]) -> list[Event]:
        """The last event."""
        return self._numbered([{"type": f"response.{whole['status']}", "response": whole}])

    def fail(self, error: ServiceError) -> list[Event]:
        """The last event of a response that came to nothing."""
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        failed = self._as_json("failed") | {"error": {"code": code, "message": error.message}}
        return self._numbered([{"type": "response.failed", "response": failed}])

    def _text(self, said: Delta) -> list[Event]:
        events: list[Event] = []
        if not isinstance(self._open, _Message):
            if not said.text:
                return []  # log-probabilities of a call's own marks belong to no text
            events += self._close("completed")
            events += self._begin(_Message(len(self._output)))
        assert isinstance(self._open, _Message)
        return events + self._open.add(said)

    def _finish(self, word: Finished) -> list[Event]:
        self._usage.add(word)
        self._cut = word.reason is FinishReason.LENGTH
        events: list[Event] = []
        if self._open is None and not self._output:  # the model said nothing, and that is a message
            events += self._begin(_Message(0))
        return events + self._close("incomplete" if self._cut else "completed")

    def _begin(self, item: _Message | _Call) -> list[Event]:
        self._open = item
        place = item.where["output_index"]
        added = {"type": "response.output_item.added", "output_index": place}
        return [added | {"item": item.as_json("in_progress")}, *item.begun()]

    def _close(self, status: str) -> list[Event]:
        item, self._open = self._open, None
        if item is None:
            return []
        whole = item.as_json(status)
        self._output.append(whole)
        done = {
            "type": "response.output_item.done",
            "output_index": item.where["output_index"],
            "item": whole,
        }
        return [*item.ended(), done]

    def _as_json(self, status: str) -> dict[str, Any]:
        return self._frame | {"status": status, "output": list(self._output)}

    def _used(self) -> dict[str, Any]:
        used = self._usage
        return {
            "input_tokens": used.prompt_tokens,
            "input_tokens_details": {"cached_tokens": used.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": used.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": used.prompt_tokens + used.completion_tokens,
        }

    def _numbered(self, events: Iterable[Event]) -> list[Event]:
        numbered = []
        for one in events:
            numbered.append({"type": one["type"], "sequence_number": self._sequence} | one)
            self._sequence += 1
        return numbered


async def collect(writer: ResponseWriter, words: AsyncIterator[list[Said]]) -> dict[str, Any]:
    """The whole response."""
    async for some in words:
        writer.take(some)
    return writer.whole()


async def stream(
    writer: ResponseWriter, words: AsyncIterator[list[Said]], keep: Keep | None
) -> AsyncIterator[bytes]:
    """Server-sent events. The last one says that the response is whole and, with `keep`, stored."""
    yield _encoded(writer.begin())
    try:
        async for some in words:
            yield _encoded(writer.take(some))
        whole = writer.whole()
        if keep is not None:
            await keep_whole(whole, keep)
    except ServiceError as error:
        yield _encoded(writer.fail(error))
        return
    yield _encoded(writer.end(whole))


def _encoded(events: Sequence[Event]) -> bytes:
    return b"".join(f"event: {one['type']}\n".encode() + event(one) for one in events)

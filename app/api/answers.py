"""Words of an answer in OpenAI's shapes: chunks of a stream, or one whole reply.

Chunks are plain dicts: one is made for every piece of text, and a model class would cost more than the rest.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from app.api.calls import CallArguments, CallBegun, Said
from app.core.completions import Delta, Finished, TokenChance

DONE = b"data: [DONE]\n\n"


@dataclass(slots=True)
class Usage:
    """Tokens read and made. The prompt is read once, however many choices come of it."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def add(self, word: Finished) -> None:
        """Count a finished choice."""
        self.prompt_tokens = word.prompt_tokens
        self.cached_tokens = word.cached_tokens
        self.completion_tokens += word.completion_tokens

    def as_json(self) -> dict[str, Any]:
        """As it stands in the reply."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(frozen=True, slots=True)
class Frame:
    """What is the same in all chunks of an answer."""

    id: str
    created: int
    model: str
    n: int
    include_usage: bool = False
    metadata: Mapping[str, str] | None = None  # of an answer that is stored

    def head(self, kind: str) -> dict[str, Any]:
        """The fields every object of this answer begins with."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


@dataclass(slots=True)
class _Choice:
    text: list[str] = field(default_factory=list)
    calls: list[tuple[CallBegun, list[str]]] = field(default_factory=list)
    logprobs: list[TokenChance] | None = None
    reason: str = "stop"

    def add(self, said: Said) -> None:
        if isinstance(said, Delta):
            self.text.append(said.text)
            if said.logprobs is not None:
                self.logprobs = [*(self.logprobs or ()), *said.logprobs]
        elif isinstance(said, CallBegun):
            self.calls.append((said, []))
        elif isinstance(said, CallArguments):
            self.calls[said.number][1].append(said.text)
        elif isinstance(said, Finished):
            self.reason = str(said.reason)

    def message(self) -> dict[str, Any]:
        """The assistant's message; without calls there is no word of calls."""
        text = "".join(self.text)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if self.calls:
            calls = [_call(call, "".join(arguments)) for call, arguments in self.calls]
            message |= {"content": text or None, "tool_calls": calls}
        return message


class Answer:
    """All choices of an answer, as far as they have come."""

    def __init__(self, frame: Frame) -> None:
        self._frame = frame
        self._choices = [_Choice() for _ in range(frame.n)]
        self.usage = Usage()

    def take(self, some: Sequence[Said]) -> None:
        """Add words to their choices."""
        for said in some:
            if isinstance(said, Finished):
                self.usage.add(said)
            if isinstance(said, Delta | Finished | CallBegun | CallArguments):
                self._choices[said.index].add(said)

    def as_json(self) -> dict[str, Any]:
        """The whole reply."""
        choices = [
            {
                "index": index,
                "message": choice.message(),
                "logprobs": _logprobs(choice.logprobs),
                "finish_reason": choice.reason,
            }
            for index, choice in enumerate(self._choices)
        ]
        whole = {**self._frame.head("chat.completion"), "choices": choices, "usage": self.usage.as_json()}
        return whole if self._frame.metadata is None else whole | {"metadata": dict(self._frame.metadata)}


async def collect(answer: Answer, words: AsyncIterator[list[Said]]) -> Answer:
    """All words in one answer."""
    async for some in words:
        answer.take(some)
    return answer


async def stream(frame: Frame, words: AsyncIterator[list[Said]]) -> AsyncIterator[bytes]:
    """Server-sent events: the role of each choice, its text and calls, its end, the usage when asked for."""
    usage = Usage()
    # All roles first and in order: the official client's helper expects choice 0 before choice 1.
    role = {"role": "assistant", "content": "", "refusal": None}
    yield b"".join(_chunk(frame, index, role, None) for index in range(frame.n))
    async for some in words:
        lines = []
        for said in some:
            if isinstance(said, Delta):
                lines.append(_chunk(frame, said.index, {"content": said.text}, None, said.logprobs))
            elif isinstance(said, Finished):
                lines.append(_chunk(frame, said.index, {}, str(said.reason)))
                usage.add(said)
            elif isinstance(said, CallBegun):
                call = {"index": said.number, **_call(said, "")}
                lines.append(_chunk(frame, said.index, {"tool_calls": [call]}, None))
            elif isinstance(said, CallArguments):
                more = {"index": said.number, "function": {"arguments": said.text}}
                lines.append(_chunk(frame, said.index, {"tool_calls": [more]}, None))
        yield b"".join(lines)
    if frame.include_usage:
        yield event({**frame.head("chat.completion.chunk"), "choices": [], "usage": usage.as_json()})
    yield DONE


def event(data: dict[str, Any]) -> bytes:
    """One event; the blank line ends it."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _chunk(
    frame: Frame,
    index: int,
    delta: dict[str, Any],
    reason: str | None,
    logprobs: Sequence[TokenChance] | None = None,
) -> bytes:
    choice = {"index": index, "delta": delta, "logprobs": _logprobs(logprobs), "finish_reason": reason}
    chunk = {**frame.head("chat.completion.chunk"), "choices": [choice]}
    if frame.include_usage:
        chunk["usage"] = None
    return event(chunk)


def _call(call: CallBegun, arguments: str) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _logprobs(chances: Sequence[TokenChance] | None) -> dict[str, Any] | None:
    if chances is None:
        return None
    return {"content": [chance.model_dump(mode="json") for chance in chances], "refusal": None}

"""Words of an answer in OpenAI's shapes: chunks of a stream, or one whole reply.

Chunks are plain dicts: one is made for every piece of text, and a model class would cost more than the rest.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from app.core.completions import Delta, Finished, TokenChance, Word

DONE = b"data: [DONE]\n\n"


@dataclass(slots=True)
class Usage:
    """Tokens read and made. The prompt is read once, however many choices come of it."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, word: Finished) -> None:
        """Count a finished choice."""
        self.prompt_tokens = word.prompt_tokens
        self.completion_tokens += word.completion_tokens

    def as_json(self) -> dict[str, Any]:
        """As it stands in the reply."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


@dataclass(frozen=True, slots=True)
class Frame:
    """What is the same in all chunks of an answer."""

    id: str
    created: int
    model: str
    n: int
    include_usage: bool = False

    def head(self, kind: str) -> dict[str, Any]:
        """The fields every object of this answer begins with."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


@dataclass(slots=True)
class _Choice:
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenChance] | None = None
    reason: str = "stop"

    def add(self, delta: Delta) -> None:
        self.text.append(delta.text)
        if delta.logprobs is not None:
            self.logprobs = [*(self.logprobs or ()), *delta.logprobs]


async def collect(frame: Frame, words: AsyncIterator[list[Word]]) -> dict[str, Any]:
    """One reply of all words."""
    choices = [_Choice() for _ in range(frame.n)]
    usage = Usage()
    async for some in words:
        for word in some:
            if isinstance(word, Delta):
                choices[word.index].add(word)
            elif isinstance(word, Finished):
                choices[word.index].reason = str(word.reason)
                usage.add(word)
    return {
        **frame.head("chat.completion"),
        "choices": [
            {
                "index": index,
                "message": {"role": "assistant", "content": "".join(choice.text), "refusal": None},
                "logprobs": _logprobs(choice.logprobs),
                "finish_reason": choice.reason,
            }
            for index, choice in enumerate(choices)
        ],
        "usage": usage.as_json(),
    }


async def stream(frame: Frame, words: AsyncIterator[list[Word]]) -> AsyncIterator[bytes]:
    """Server-sent events: the role of each choice, its text, its end, the usage when asked for."""
    usage = Usage()
    # All roles first and in order: the official client's helper expects choice 0 before choice 1.
    role = {"role": "assistant", "content": "", "refusal": None}
    yield b"".join(_chunk(frame, index, role, None) for index in range(frame.n))
    async for some in words:
        lines = []
        for word in some:
            if isinstance(word, Delta):
                lines.append(_chunk(frame, word.index, {"content": word.text}, None, word.logprobs))
            elif isinstance(word, Finished):
                lines.append(_chunk(frame, word.index, {}, str(word.reason)))
                usage.add(word)
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


def _logprobs(chances: Sequence[TokenChance] | None) -> dict[str, Any] | None:
    if chances is None:
        return None
    return {"content": [chance.model_dump(mode="json") for chance in chances], "refusal": None}

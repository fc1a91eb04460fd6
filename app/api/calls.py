"""Words of an answer with its tool calls read out of the text; the text of a call is no text any more."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass

from app.core.completions import Delta, Finished, FinishReason, TokenChance, Word
from app.core.ids import Prefix, new_id
from app.core.tool_calls import Arguments, Begin, CallReader, Piece, Text


@dataclass(frozen=True, slots=True)
class CallBegun:
    """A call of choice `index`; `number` counts its calls from 0."""

    index: int
    number: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments, as JSON text."""

    index: int
    number: int
    text: str


Said = Word | CallBegun | CallArguments


async def with_calls(words: AsyncIterator[list[Word]], *, n: int) -> AsyncIterator[list[Said]]:
    """The words with calls in them, as they come. A choice that ends by itself after a call says so."""
    readers = [CallReader() for _ in range(n)]
    async for some in words:
        said: list[Said] = []
        for word in some:
            if isinstance(word, Delta):
                said += _said(word.index, readers[word.index].push(word.text), word.logprobs)
            elif isinstance(word, Finished):
                reader = readers[word.index]
                said += _said(word.index, reader.finish(), None)
                said.append(_ended(word, calls=reader.calls))
            else:
                said.append(word)
        if said:
            yield said


def _said(index: int, pieces: Sequence[Piece], logprobs: tuple[TokenChance, ...] | None) -> Iterable[Said]:
    if logprobs and not (pieces and isinstance(pieces[0], Text)):
        yield Delta(index=index, text="", logprobs=logprobs)
        logprobs = None
    for piece in pieces:
        match piece:
            case Text(text):
                yield Delta(index=index, text=text, logprobs=logprobs)
                logprobs = None
            case Begin(number, name):
                yield CallBegun(index, number, new_id(Prefix.CALL), name)
            case Arguments(number, text):
                yield CallArguments(index, number, text)


def _ended(word: Finished, *, calls: int) -> Finished:
    if calls and word.reason is FinishReason.STOP:
        return word.model_copy(update={"reason": FinishReason.TOOL_CALLS})
    return word

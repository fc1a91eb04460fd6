"""Words of plain completions in OpenAI's shapes: `text_completion`, whole or in chunks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from app.api.answers import DONE, Frame, Usage, event
from app.core.completions import Delta, Finished, TokenChance, Word

KIND = "text_completion"


class Texts:
    """All choices of all prompts; choice `i` belongs to prompt `i // made`. Of those made of a prompt the
    `kept` likeliest are shown. `echoes`: texts put before them. `shows`: log-probabilities too."""

    def __init__(self, frame: Frame, *, made: int, kept: int, echoes: Sequence[str], shows: bool) -> None:
        self._frame = frame
        self._per_prompt = made
        self._kept = kept
        self._echoes = echoes
        self._shows = shows
        self._logged = [_Logprobs() for _ in range(frame.n)]
        self._prompts: dict[int, int] = {}  # prompt → its tokens
        self._made = 0

    async def collect(self, words: AsyncIterator[list[Word]]) -> dict[str, Any]:
        """One reply of all words."""
        texts = [[self._echo(index)] for index in range(self._frame.n)]
        chances: list[list[TokenChance] | None] = [None] * self._frame.n
        reasons = ["stop"] * self._frame.n
        async for some in words:
            for word in some:
                if isinstance(word, Delta):
                    texts[word.index].append(word.text)
                    if word.logprobs is not None:
                        chances[word.index] = [*(chances[word.index] or ()), *word.logprobs]
                elif isinstance(word, Finished):
                    reasons[word.index] = str(word.reason)
                    self._count(word)
        choices = [
            self._choice(index, "".join(texts[index]), reasons[index], chances[index])
            for index in range(self._frame.n)
        ]
        if self._kept < self._per_prompt:
            firsts = range(0, self._frame.n, self._per_prompt)
            best = [index for first in firsts for index in self._best(first, chances)]
            choices = [choices[index] | {"index": place} for place, index in enumerate(best)]
        return {**self._frame.head(KIND), "choices": choices, "usage": self._usage()}

    async def stream(self, words: AsyncIterator[list[Word]]) -> AsyncIterator[bytes]:
        """Server-sent events: the echo, the text, the end of each choice, the usage when asked for."""
        yield b"".join(self._chunk(i, self._echo(i)) for i in range(self._frame.n) if self._echo(i))
        async for some in words:
            lines = []
            for word in some:
                if isinstance(word, Delta):
                    lines.append(self._chunk(word.index, word.text, None, word.logprobs))
                elif isinstance(word, Finished):
                    lines.append(self._chunk(word.index, "", str(word.reason)))
                    self._count(word)
            yield b"".join(lines)
        if self._frame.include_usage:
            yield event({**self._frame.head(KIND), "choices": [], "usage": self._usage()})
        yield DONE

    def _best(self, first: int, chances: Sequence[Sequence[TokenChance] | None]) -> list[int]:
        """Of one prompt's choices those of the highest log-probability per token, the likeliest first."""
        made = range(first, first + self._per_prompt)
        return sorted(made, key=lambda index: _per_token(chances[index]), reverse=True)[: self._kept]

    def _echo(self, index: int) -> str:
        return self._echoes[index // self._per_prompt] if self._echoes else ""

    def _count(self, word: Finished) -> None:
        self._prompts[word.index // self._per_prompt] = word.prompt_tokens
        self._made += word.completion_tokens

    def _usage(self) -> dict[str, Any]:
        return Usage(sum(self._prompts.values()), self._made).as_json()

    def _chunk(
        self,
        index: int,
        text: str,
        reason: str | None = None,
        chances: Sequence[TokenChance] | None = None,
    ) -> bytes:
        chunk = {**self._frame.head(KIND), "choices": [self._choice(index, text, reason, chances)]}
        if self._frame.include_usage:
            chunk["usage"] = None
        return event(chunk)

    def _choice(
        self, index: int, text: str, reason: str | None, chances: Sequence[TokenChance] | None
    ) -> dict[str, Any]:
        logprobs = self._logged[index].as_json(chances) if self._shows and chances is not None else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def _per_token(chances: Sequence[TokenChance] | None) -> float:
    """Natural log-probability per token; an answer without tokens comes last."""
    if not chances:
        return float("-inf")
    return sum(chance.logprob for chance in chances) / len(chances)


class _Logprobs:
    """Log-probabilities in the old shape: lists side by side, offsets counted in characters of the answer."""

    def __init__(self) -> None:
        self._seen = b""  # bytes of the tokens so far

    def as_json(self, chances: Sequence[TokenChance]) -> dict[str, Any]:
        offsets = []
        for chance in chances:
            offsets.append(len(self._seen.decode("utf-8", "ignore")))
            self._seen += bytes(chance.bytes)
        return {
            "tokens": [chance.token for chance in chances],
            "token_logprobs": [chance.logprob for chance in chances],
            "top_logprobs": [{top.token: top.logprob for top in c.top_logprobs} for c in chances],
            "text_offset": offsets,
        }

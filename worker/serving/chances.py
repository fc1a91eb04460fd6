"""Log-probabilities of one choice on their way out, in OpenAI's shape.

Each travels with the text in which its token begins, so those of a stop string, which is cut out, never
leave. Knows bytes and text, nothing of the model.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

from app.core.completions import Chance, TokenChance
from worker.serving.sampling import Chances


class TokenBytes(Protocol):
    """Bytes of a vocabulary's tokens."""

    def decode_bytes(self, tokens: list[int]) -> bytes: ...

    def is_special_token(self, token: int) -> bool: ...


class ChanceStream:
    """Takes a token at a time, gives out those whose text has left."""

    def __init__(self, tokens: TokenBytes) -> None:
        self._tokens = tokens
        self._waiting: deque[tuple[int, TokenChance]] = deque()  # (first byte in the answer, chance)
        self._made = 0  # bytes of all tokens so far
        self._sent = 0  # bytes of the text that was given out

    def push(self, token_id: int, chances: Chances) -> None:
        """One more token of the answer."""
        top = tuple(Chance(**self._named(id), logprob=logprob) for id, logprob in chances.top)
        chance = TokenChance(**self._named(token_id), logprob=chances.logprob, top_logprobs=top)
        self._waiting.append((self._made, chance))
        if not self._tokens.is_special_token(token_id):  # those carry no text
            self._made += len(chance.bytes)

    def take(self, text: str) -> tuple[TokenChance, ...]:
        """Those that begin in `text`, which is what leaves next."""
        self._sent += len(text.encode("utf-8", "surrogatepass"))
        taken = []
        while self._waiting and self._waiting[0][0] < self._sent:
            taken.append(self._waiting.popleft()[1])
        return tuple(taken)

    def rest(self) -> tuple[TokenChance, ...]:
        """All that is left, at the end of an answer that no stop string cut."""
        rest = tuple(chance for _, chance in self._waiting)
        self._waiting.clear()
        return rest

    def _named(self, token_id: int) -> dict[str, str | tuple[int, ...]]:
        """Part of a character is shown as OpenAI does: `\\xe7\\x8c`."""
        data = self._tokens.decode_bytes([token_id])
        return {"token": data.decode("utf-8", "backslashreplace"), "bytes": tuple(data)}

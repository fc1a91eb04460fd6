"""What one choice does to the model's logits before its token is chosen: bias, penalties, a grammar.

Pure arithmetic on one row. The state is that of the choice alone: which tokens it has made so far, and where
in its grammar it stands. Knows nothing of requests, text or other rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor


class Grammar(Protocol):
    """Says which tokens may come next."""

    def mask(self, vocabulary: int) -> Tensor | None:
        """Bool V, on the CPU, True where a token may come; None once the grammar has failed."""

    def take(self, token_id: int) -> None:
        """Go on by one token."""


class Adjustments:
    """All that changes the logits of one choice.

    OpenAI's formula: `logit[j] += bias[j] - count[j] * frequency - (count[j] > 0) * presence`, with `count`
    over the tokens generated so far, the prompt's not among them (API guide "Frequency and presence
    penalties"). What the grammar forbids becomes -inf afterwards, so no bias can bring it back.
    """

    def __init__(
        self,
        *,
        bias: Mapping[int, float] | None = None,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        grammar: Grammar | None = None,
    ) -> None:
        self._bias = dict(bias or {})
        self._frequency = frequency_penalty
        self._presence = presence_penalty
        self._grammar = grammar
        self._counts: Counter[int] = Counter()

    def apply(self, logits_V: Tensor) -> None:
        """Change `logits_V` (float, V) in place. All become NaN when the grammar has failed."""
        _add(logits_V, self._bias)
        if self._counts:
            _add(
                logits_V,
                {id: -count * self._frequency - self._presence for id, count in self._counts.items()},
            )
        if self._grammar is not None:
            allowed_V = self._grammar.mask(len(logits_V))
            if allowed_V is None:
                logits_V.fill_(torch.nan)
            else:
                logits_V.masked_fill_(~allowed_V.to(logits_V.device), -torch.inf)

    def take(self, token_id: int) -> None:
        """Count a chosen token."""
        if self._frequency or self._presence:
            self._counts[token_id] += 1
        if self._grammar is not None:
            self._grammar.take(token_id)


def _add(logits_V: Tensor, amounts: Mapping[int, float]) -> None:
    if amounts:
        ids = torch.tensor(list(amounts), device=logits_V.device)
        logits_V[ids] += torch.tensor(list(amounts.values()), dtype=logits_V.dtype, device=logits_V.device)

"""Chooses the next token of every row: greedy, or drawn by temperature and nucleus (top-p).

Pure arithmetic on logits. Each choice brings its own random numbers, so a seeded choice draws the same
numbers whoever shares its batch; what it asks beyond that (`adjustments`) changes its own row only. Knows
nothing of requests or text.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.serving.adjustments import Adjustments

NUCLEUS_GUESS = 256  # top-p sets are nearly always this small; a sort of all 49,152 logits costs ms
TEMPERATURE_MIN = 1e-6  # below it float32 would divide by 0; it is greedy for all that matters


LOGPROB_MIN = -9999.0  # OpenAI's word for "impossible"; JSON has no infinity


@dataclass(frozen=True, slots=True)
class Chances:
    """Natural log-probabilities at one place: of the chosen token, and of the most likely ones in order."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(slots=True)
class Chooser:
    """How one choice picks tokens; `temperature` 0 means greedy and draws no numbers.

    With `top_logprobs` set, `chances` tells those of the last token chosen.
    """

    temperature: float
    top_p: float
    random: random.Random
    adjustments: Adjustments | None = None
    top_logprobs: int | None = None
    chances: Chances | None = None


def make_chooser(
    temperature: float,
    top_p: float,
    *,
    seed: int | None,
    index: int,
    adjustments: Adjustments | None = None,
) -> Chooser:
    """The chooser of choice `index`; with a seed it repeats itself, and every index differs."""
    source = random.Random() if seed is None else random.Random(f"{seed}:{index}")  # noqa: S311 - no secret
    return Chooser(temperature, top_p, source, adjustments)


def choose_tokens(logits_BV: Tensor, choosers: Sequence[Chooser]) -> list[int]:
    """One token id per row.

    logits_BV: float, any device, B rows of V logits; left as they are. A row whose logits are not numbers
    gives -1, so that one broken adapter cannot fail its neighbours. A choice's adjustments come first;
    temperature divides the logits before the softmax; top-p keeps the smallest set of most likely tokens
    whose probabilities sum to at least `top_p` (Holtzman et al. 2020, "The Curious Case of Neural Text
    Degeneration", section 3.1).
    """
    adjusted_BV = _adjust(logits_BV, choosers)
    best_B, ids_B = adjusted_BV.max(dim=-1)
    drawn = [row for row, chooser in enumerate(choosers) if chooser.temperature > 0]
    if drawn:
        rows_D = torch.tensor(drawn, device=logits_BV.device)
        drawn_D = _draw(adjusted_BV[rows_D], best_B[rows_D], [choosers[row] for row in drawn])
        ids_B = ids_B.index_copy(0, rows_D, drawn_D)
    ids_B = torch.where(best_B.isfinite(), ids_B, -1)
    ids: list[int] = ids_B.tolist()
    _note_chances(logits_BV, ids, choosers)
    for chooser, token_id in zip(choosers, ids, strict=True):
        if chooser.adjustments is not None and token_id >= 0:
            chooser.adjustments.take(token_id)
    return ids


def _adjust(logits_BV: Tensor, choosers: Sequence[Chooser]) -> Tensor:
    """The logits as the choices want them: a copy where any of them has adjustments."""
    asking = [(row, c.adjustments) for row, c in enumerate(choosers) if c.adjustments is not None]
    if not asking:
        return logits_BV
    adjusted_BV = logits_BV.float().clone()
    for row, adjustments in asking:
        adjustments.apply(adjusted_BV[row])
    return adjusted_BV


def _note_chances(logits_BV: Tensor, ids: list[int], choosers: Sequence[Chooser]) -> None:
    """Log-softmax of the model's own logits (temperature 1, nothing adjusted), for rows that ask."""
    rows = [row for row, c in enumerate(choosers) if c.top_logprobs is not None and ids[row] >= 0]
    if not rows:
        return
    rows_N = torch.tensor(rows, device=logits_BV.device)
    logprobs_NV = logits_BV[rows_N].float().log_softmax(dim=-1).clamp_(min=LOGPROB_MIN)
    ids_N1 = torch.tensor([[ids[row]] for row in rows], device=logits_BV.device)
    chosen: list[float] = logprobs_NV.gather(1, ids_N1).squeeze(1).tolist()
    top_NK = logprobs_NV.topk(max(choosers[row].top_logprobs or 0 for row in rows), dim=-1)
    top_logprobs, top_ids = top_NK.values.tolist(), top_NK.indices.tolist()
    for number, row in enumerate(rows):
        count = choosers[row].top_logprobs or 0
        top = tuple(zip(top_ids[number][:count], top_logprobs[number][:count], strict=True))
        choosers[row].chances = Chances(chosen[number], top)


def _draw(logits_DV: Tensor, best_D: Tensor, choosers: Sequence[Chooser]) -> Tensor:
    """Draw one id per row by inverting the cumulative distribution; returns int64 of shape D."""
    device = logits_DV.device
    temperature_D1 = torch.tensor([[max(c.temperature, TEMPERATURE_MIN)] for c in choosers], device=device)
    uniform_D1 = torch.tensor([[c.random.random()] for c in choosers], dtype=torch.float64, device=device)
    # The best logit is taken off first: a tiny temperature must not overflow.
    scaled_DV = (logits_DV.float() - best_D.float()[:, None]) / temperature_D1
    weights_DV = scaled_DV.softmax(dim=-1)
    narrowed = [row for row, chooser in enumerate(choosers) if chooser.top_p < 1.0]
    if narrowed:  # rows with top_p 1 stay untouched: rounding must not cut their tail
        rows_N = torch.tensor(narrowed, device=device)
        top_p = [[choosers[row].top_p] for row in narrowed]
        top_p_N1 = torch.tensor(top_p, dtype=torch.float64, device=device)
        weights_DV[rows_N] = _keep_nucleus(weights_DV[rows_N], top_p_N1)
    cumulative_DV = weights_DV.double().cumsum(dim=-1)
    target_D1 = uniform_D1 * cumulative_DV[:, -1:]
    # right=True: a token of weight 0 has an empty interval and can never be hit.
    ids_D1 = torch.searchsorted(cumulative_DV, target_D1, right=True)
    return ids_D1.squeeze(1).clamp_(max=logits_DV.shape[-1] - 1)


def _keep_nucleus(weights_NV: Tensor, top_p_N1: Tensor) -> Tensor:
    """Set all weights outside each row's nucleus to 0; the most likely token always stays."""
    guess = min(NUCLEUS_GUESS, weights_NV.shape[-1])
    sorted_NK, order_NK = weights_NV.topk(guess, dim=-1)
    cumulative_NK = sorted_NK.double().cumsum(dim=-1)
    if guess < weights_NV.shape[-1] and bool((cumulative_NK[:, -1:] < top_p_N1).any()):
        sorted_NK, order_NK = weights_NV.sort(dim=-1, descending=True)
        cumulative_NK = sorted_NK.double().cumsum(dim=-1)
    outside_NK = cumulative_NK - sorted_NK >= top_p_N1
    outside_NK[:, 0] = False
    kept_NK = sorted_NK.masked_fill(outside_NK, 0.0)
    return torch.zeros_like(weights_NV).scatter_(1, order_NK, kept_NK)

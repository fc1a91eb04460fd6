"""Chooses the next token of every row: greedy, or drawn by temperature and nucleus (top-p).

Pure arithmetic on logits. Each choice brings its own random numbers, so a seeded choice draws the same
numbers whoever shares its batch. Knows nothing of requests or text.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

NUCLEUS_GUESS = 256  # top-p sets are nearly always this small; a sort of all 49,152 logits costs ms
TEMPERATURE_MIN = 1e-6  # below it float32 would divide by 0; it is greedy for all that matters


class Chooser(NamedTuple):
    """How one choice picks tokens; `temperature` 0 means greedy and draws no numbers."""

    temperature: float
    top_p: float
    random: random.Random


def make_chooser(temperature: float, top_p: float, *, seed: int | None, index: int) -> Chooser:
    """The chooser of choice `index`; with a seed it repeats itself, and every index differs."""
    source = random.Random() if seed is None else random.Random(f"{seed}:{index}")  # noqa: S311 - no secret
    return Chooser(temperature, top_p, source)


def choose_tokens(logits_BV: Tensor, choosers: Sequence[Chooser]) -> list[int]:
    """One token id per row.

    logits_BV: float, any device, B rows of V logits. A row whose logits are not numbers gives -1, so that
    one broken adapter cannot fail its neighbours. Temperature divides the logits before the softmax;
    top-p keeps the smallest set of most likely tokens whose probabilities sum to at least `top_p`
    (Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1).
    """
    best_B, ids_B = logits_BV.max(dim=-1)
    drawn = [row for row, chooser in enumerate(choosers) if chooser.temperature > 0]
    if drawn:
        rows_D = torch.tensor(drawn, device=logits_BV.device)
        drawn_D = _draw(logits_BV[rows_D], best_B[rows_D], [choosers[row] for row in drawn])
        ids_B = ids_B.index_copy(0, rows_D, drawn_D)
    ids_B = torch.where(best_B.isfinite(), ids_B, -1)
    ids: list[int] = ids_B.tolist()
    return ids


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

"""Attention over flat batches against a dense mask."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import softmax

from worker.training.attention import segmented_attention


class Grouped(torch.nn.Module):
    """What the attention interface reads of a layer: two query heads share one key head."""

    num_key_value_groups = 2
    is_causal = True


def dense(heads: list[torch.Tensor], allowed_TT: torch.Tensor) -> torch.Tensor:
    query, key, value = heads[0], *(head.repeat_interleave(2, dim=1) for head in heads[1:])
    scores = (query @ key.transpose(2, 3) * 0.5).masked_fill(~allowed_TT, -torch.inf)
    return (softmax(scores, dim=-1) @ value).transpose(1, 2)


def allowed(prefix: int, lengths: tuple[int, ...], window: int | None) -> torch.Tensor:
    """Spelled out token by token: (owner, position) of each, owner 0 being the shared prefix."""
    tokens = [(0, at) for at in range(prefix)]
    for owner, length in enumerate(lengths, start=1):
        tokens += [(owner, prefix + at) for at in range(length)]
    rows = [
        [owner in (0, mine) and at <= here and (window is None or here - at < window) for owner, at in tokens]
        for mine, here in tokens
    ]
    return torch.tensor(rows)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(("prefix", "lengths"), [(0, (7,)), (0, (3, 5, 1)), (6, (3, 5, 1)), (2, (9, 9))])
def test_segments_see_the_prefix_and_themselves_and_nothing_else(
    prefix: int, lengths: tuple[int, ...], window: int | None
) -> None:
    torch.manual_seed(0)
    total = prefix + sum(lengths)
    heads = [torch.randn(1, count, total, 8, dtype=torch.float64, requires_grad=True) for count in (4, 2, 2)]
    expected = dense(heads, allowed(prefix, lengths, window))
    actual, _ = segmented_attention(
        Grouped(), *heads, None, segments=(prefix, lengths), sliding_window=window, scaling=0.5
    )
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    weights = torch.randn_like(expected)
    for mine, reference in zip(
        torch.autograd.grad((actual * weights).sum(), heads),
        torch.autograd.grad((expected * weights).sum(), heads),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-12)

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


Segments = tuple[tuple[int, ...], tuple[int, ...]]


def allowed(segments: Segments, window: int | None) -> torch.Tensor:
    """Spelled out token by token: the segment of each and its position in the example."""
    parents, lengths = segments
    starts: list[int] = []
    for parent in parents:
        starts.append(0 if parent < 0 else starts[parent] + lengths[parent])
    tokens = [(owner, starts[owner] + at) for owner, length in enumerate(lengths) for at in range(length)]
    rows = []
    for mine, here in tokens:
        path = {mine}
        above = parents[mine]
        while above >= 0:
            path.add(above)
            above = parents[above]
        rows.append(
            [owner in path and at <= here and (window is None or here - at < window) for owner, at in tokens]
        )
    return torch.tensor(rows)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(
    "segments",
    [
        ((-1,), (7,)),
        ((-1, -1, -1), (3, 5, 1)),
        ((-1, 0, 0), (6, 3, 5)),
        ((-1, 0, 1, 1, 0, -1, 5), (4, 3, 2, 5, 1, 2, 6)),
    ],
    ids=["one", "apart", "a shared prefix", "a tree and another"],
)
def test_segments_see_their_path_and_themselves_and_nothing_else(
    segments: Segments, window: int | None
) -> None:
    torch.manual_seed(0)
    total = sum(segments[1])
    heads = [torch.randn(1, count, total, 8, dtype=torch.float64, requires_grad=True) for count in (4, 2, 2)]
    expected = dense(heads, allowed(segments, window))
    actual, _ = segmented_attention(
        Grouped(), *heads, None, segments=segments, sliding_window=window, scaling=0.5
    )
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    weights = torch.randn_like(expected)
    for mine, reference in zip(
        torch.autograd.grad((actual * weights).sum(), heads),
        torch.autograd.grad((expected * weights).sum(), heads),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-12)

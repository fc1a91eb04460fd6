"""Attention inside each example of a flat batch, for any model that uses transformers' attention interface.

Examples lie end to end in one sequence, so linear layers see no padding; here, and only here, they are
taken apart. FlexAttention would do the same with a block mask but has no backward pass on CPUs.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

SEGMENTED = "luthier_segmented"


def segmented_attention(
    module: torch.nn.Module,
    query_1HTD: torch.Tensor,
    key_1KTD: torch.Tensor,
    value_1KTD: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001 the interface hands it over, here always None
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of every segment with itself; `segment_lengths` in `options` adds up to T.

    Takes (1, heads, T, D), keys and values with their own head count, and returns (1, T, heads, D) in the
    same dtype. Equal to attention under a block-diagonal causal mask.
    """
    lengths: tuple[int, ...] = options.pop("segment_lengths")
    window: int | None = options.pop("sliding_window", None)
    # One split, not slices: the backward pass of slices fills a whole tensor of zeros for every segment.
    heads = (query_1HTD, key_1KTD, value_1KTD)
    parts = zip(*(torch.split_with_sizes(tensor, lengths, dim=2) for tensor in heads), strict=True)
    outputs = [
        sdpa_attention_forward(module, query, key, value, _band(query, window), **options)[0]
        for query, key, value in parts
    ]
    return torch.cat(outputs, dim=1), None


def _band(query: torch.Tensor, window: int | None) -> torch.Tensor | None:
    """The mask of sliding-window attention, True where a token may look; None where causality is enough."""
    length = query.shape[2]
    if window is None or length <= window:
        return None
    allowed = torch.ones(length, length, dtype=torch.bool, device=query.device)
    return allowed.tril().triu(1 - window)


# No mask function is registered under this name, so transformers builds no mask of T x T either.
AttentionInterface.register(SEGMENTED, segmented_attention)

"""Attention inside each example of a flat batch, for any model that uses transformers' attention interface.

Examples lie end to end in one sequence, so linear layers see no padding; here, and only here, they are
taken apart. FlexAttention would do the same with a block mask but has no backward pass on CPUs.
"""

from __future__ import annotations

from functools import lru_cache
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
    """Causal attention of every segment with those it goes on from and with itself.

    `segments` in `options` is (parents, lengths), parents before their children and -1 where there is none;
    the lengths add up to T. Takes (1, heads, T, D), keys and values with their own head count, and returns
    (1, T, heads, D) in the same dtype. Equal to attention under a mask by which tokens see these alone.
    """
    parents, lengths = options.pop("segments")
    window: int | None = options.pop("sliding_window", None)
    heads = [query_1HTD, key_1KTD, value_1KTD]
    if query_1HTD.device.type == "cpu":
        # torch 2.13's bfloat16 kernel takes twice the time of the float32 one on short segments, even on
        # CPUs with bfloat16 units: 3.6 against 1.7 ms for 75 tokens after a prefix of 50, both ways.
        heads = [head.to(torch.promote_types(head.dtype, torch.float32)) for head in heads]
    # One split, not slices: the backward pass of slices fills a whole tensor of zeros for every segment.
    queries, keys, values = (list(torch.split_with_sizes(tensor, lengths, dim=2)) for tensor in heads)
    outputs = []
    for number, (parent, query) in enumerate(zip(parents, queries, strict=True)):
        if parent >= 0:  # its keys are those of its whole path by now
            keys[number] = torch.cat((keys[parent], keys[number]), dim=2)
            values[number] = torch.cat((values[parent], values[number]), dim=2)
        key, value = keys[number], values[number]
        mask = _mask(query.shape[2], key.shape[2], window, query.device)
        outputs.append(sdpa_attention_forward(module, query, key, value, mask, **options)[0])
    return torch.cat(outputs, dim=1).to(query_1HTD.dtype), None


@lru_cache(maxsize=64)  # every layer asks for the same ones
def _mask(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """(1, 1, queries, keys) bool, True where a token may look; None where plain causality is enough.

    The queries are the last of the keys, so query i looks at keys up to keys - queries + i.
    """
    before = keys - queries
    if before == 0 and (window is None or keys <= window):
        return None
    allowed = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(before)
    return (allowed if window is None else allowed.triu(before + 1 - window))[None, None]


# No mask function is registered under this name, so transformers builds no mask of T x T either.
AttentionInterface.register(SEGMENTED, segmented_attention)

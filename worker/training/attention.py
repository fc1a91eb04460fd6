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
    """Causal attention of every segment with the prefix all share and with itself.

    `segments` in `options` is (prefix, lengths) and adds up to T; the prefix may be 0. Takes
    (1, heads, T, D), keys and values with their own head count, and returns (1, T, heads, D) in the same
    dtype. Equal to attention under a causal mask in which segments do not see each other.
    """
    prefix, lengths = options.pop("segments")
    window: int | None = options.pop("sliding_window", None)
    heads = [query_1HTD, key_1KTD, value_1KTD]
    if query_1HTD.device.type == "cpu":
        # torch 2.13's bfloat16 kernel takes twice the time of the float32 one on short segments, even on
        # CPUs with bfloat16 units: 3.6 against 1.7 ms for 75 tokens after a prefix of 50, both ways.
        heads = [head.to(torch.promote_types(head.dtype, torch.float32)) for head in heads]
    # One split, not slices: the backward pass of slices fills a whole tensor of zeros for every segment.
    queries, keys, values = (torch.split_with_sizes(tensor, (prefix, *lengths), dim=2) for tensor in heads)
    outputs = []
    for number, query in enumerate(queries):
        if query.shape[2] == 0:
            continue
        key, value = keys[number], values[number]
        if number and prefix:
            key, value = torch.cat((keys[0], key), dim=2), torch.cat((values[0], value), dim=2)
        mask = _mask(query.shape[2], key.shape[2], window, query.device)
        outputs.append(sdpa_attention_forward(module, query, key, value, mask, **options)[0])
    return torch.cat(outputs, dim=1).to(query_1HTD.dtype), None


@lru_cache(maxsize=32)  # every layer asks for the same few
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

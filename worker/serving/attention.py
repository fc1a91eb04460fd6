"""Attention of one new token per row over the rows' caches, in two batched products.

torch's own kernel computes a query of one token at a fraction of its speed, and repeats keys for grouped
queries. Longer queries (prompts) go to torch's kernel. Knows tensors only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "one_token_rows"


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """softmax(query @ key.T * scaling) @ value, in transformers' own signature.

    query: BHTD; key, value: BKLD with H a multiple of K. attention_mask: B11L, True where a key counts.
    Returns BTHD.
    """
    if query.shape[2] != 1 or (attention_mask is not None and attention_mask.dtype is not torch.bool):
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return output, None
    rows, heads, _, size = query.shape
    kv_heads, length = key.shape[1:3]
    scaling = options.get("scaling") or size**-0.5
    query_NGD = (query * scaling).reshape(rows * kv_heads, heads // kv_heads, size)
    scores_NGL = torch.bmm(query_NGD, key.flatten(0, 1).transpose(1, 2))
    if attention_mask is not None:
        scores_BHL = scores_NGL.view(rows, heads, length)
        scores_BHL.masked_fill_(~attention_mask[:, :, 0], -torch.inf)
    weights_NGL = scores_NGL.softmax(dim=-1)
    return torch.bmm(weights_NGL, value.flatten(0, 1)).view(rows, 1, heads, size), None


def use_row_attention(model: PreTrainedModel) -> None:
    """Make the model's layers attend by `attend`."""
    model.set_attn_implementation(NAME)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)

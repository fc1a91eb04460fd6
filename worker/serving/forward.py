"""One pass of a model over rows of a cache: what the engine computes in every step.

Knows tensors and the cache; adapters have been routed before, and which requests the rows belong to it does
not know.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from worker.serving.cache import SlotCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def forward(
    model: PreTrainedModel, cache: SlotCache, ids: list[list[int]], *, first: int, keep: int = 1
) -> Tensor:
    """Logits (B, keep, V) of the last `keep` positions, after writing `ids` behind rows `first`, ….

    ids: B lists of one length T, T = 1 unless B = 1. The cache has room for them; the rows are longer by T.
    """
    ids_BT = torch.tensor(ids, device=cache.device)
    count = ids_BT.shape[1]
    step = cache.begin(first, len(ids), new_tokens=count)
    positions_BT = step.starts_B[:, None] + torch.arange(count, device=cache.device)
    mask_B1TL = None  # plain causal attention
    if not step.uniform or (count > 1 and step.longest > 0):
        keys_L = torch.arange(step.longest + count, device=cache.device)
        mask_B1TL = (keys_L <= positions_BT[:, :, None])[:, None]
    output = model(
        input_ids=ids_BT,
        position_ids=positions_BT,
        attention_mask=mask_B1TL,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=keep,
    )
    logits_BKV: Tensor = output.logits
    return logits_BKV

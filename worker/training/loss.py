"""The training loss on a flat batch: cross-entropy at the labelled positions, and nothing computed elsewhere.

Knows neither optimizer nor adapters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from worker.training.data import FlatBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Sums(NamedTuple):
    """Sums over labelled tokens; means are taken once a whole batch or file has been added up."""

    loss: torch.Tensor  # float32 scalar, nats, carries the gradient
    correct: torch.Tensor  # int64 scalar, tokens whose most likely prediction was the label
    labels: int


def loss_sums(model: PreTrainedModel, batch: FlatBatch) -> Sums:
    """Sum of -log p(label) over the N labels of `batch`, in float32 nats, and of right first guesses.

    The model runs once over all T tokens with attention inside each example; logits (N, vocabulary) exist
    only where there is a label, as in TRL's and Liger's losses.
    """
    logits_NV = _logits(model, batch)
    loss = F.cross_entropy(logits_NV, batch.labels, reduction="sum")
    correct = (logits_NV.detach().argmax(dim=-1) == batch.labels).sum()
    return Sums(loss, correct, len(batch.labels))


def label_log_probabilities(model: PreTrainedModel, batch: FlatBatch) -> torch.Tensor:
    """log p(label) of each of the N labels of `batch`, float32 nats: what `loss_sums` adds up."""
    return -F.cross_entropy(_logits(model, batch), batch.labels, reduction="none")


def _logits(model: PreTrainedModel, batch: FlatBatch) -> torch.Tensor:
    """Of the N rows that predict a label, float32 (N, vocabulary)."""
    logits_1NV: torch.Tensor = model(
        input_ids=batch.ids[None],
        position_ids=batch.positions[None],
        use_cache=False,
        logits_to_keep=batch.rows,
        segments=(batch.parents, batch.lengths),
    ).logits
    return logits_1NV[0].float()

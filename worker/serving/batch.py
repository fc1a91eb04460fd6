"""One model and the sequences that run on it together: they join and leave between two steps.

A new sequence is computed by itself (prefill, exact), then its row joins the others, whatever adapter each
row uses. When the token budget is full, the youngest row gives its place back and is computed again later.
Knows models, rows and adapters; nothing of threads, requests' words or the world outside.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from app.core.completions import TunedWeights, WeightsKind
from worker.serving.adapter_files import ModelUnavailable
from worker.serving.adapters import BASE, AdapterSet
from worker.serving.cache import SlotCache
from worker.serving.sampling import choose_tokens
from worker.serving.scheduler import FairQueue
from worker.serving.sequence import Completion, Sequence

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEADROOM = 64  # tokens a new row must be able to grow, so that it is not sent back at once


class CannotBegin(Exception):
    """A waiting sequence's adapter cannot be loaded."""

    def __init__(self, sequence: Sequence, reason: ModelUnavailable) -> None:
        super().__init__(str(reason))
        self.sequence = sequence
        self.reason = reason


class ModelGroup:
    """A model, its waiting line and its running batch; row i of the cache belongs to `rows[i]`."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_batch: int,
        max_tokens: int,
        adapter_bytes: int,
        on_read: Callable[[], None] = lambda: None,
    ) -> None:
        refuse_special_attention(model)
        self.model = model
        self._device = model.device
        self.context_length: int = model.config.max_position_embeddings
        self.adapters = AdapterSet(model, budget_bytes=adapter_bytes, max_slots=max_batch, on_read=on_read)
        self._max_batch = max_batch
        self.cache = SlotCache(
            model.config.num_hidden_layers,
            max_rows=max_batch,
            max_tokens=max(max_tokens, self.context_length),  # one sequence alone always fits
            device=model.device,
        )
        self.queue = FairQueue()
        self.rows: list[Sequence] = []
        self._age: list[Sequence] = []  # running sequences, oldest first
        self.preemptions = 0

    @property
    def idle(self) -> bool:
        """Nothing runs and nothing waits."""
        return not self.rows and not self.queue

    def admit(self) -> Sequence | None:
        """Give the next waiting sequence a row, if there is one and it fits.

        One whose adapter is just being read lets those behind it go first, for that is soon over; for want
        of memory nobody is overtaken. Raises CannotBegin; that sequence stays in line.
        """
        for sequence in islice(self.queue, self._max_batch):
            length = min(max(len(sequence.ids), self.cache.longest) + HEADROOM, self.context_length)
            if not self.cache.reserve(len(self.rows) + 1, length):
                return None
            tuned = _adapter_of(sequence.completion)
            try:
                sequence.adapter = self.adapters.acquire(tuned)
            except ModelUnavailable as error:
                raise CannotBegin(sequence, error) from error
            if sequence.adapter is not None:
                self.queue.take(sequence)
                return sequence
            if tuned is None or not self.adapters.is_being_read(tuned):
                return None
        return None

    def prefill(self, sequence: Sequence) -> None:
        """Compute an admitted sequence up to its first new token, in a row of its own; O(T) tokens."""
        source = self._row_with_prompt(sequence)
        logits_1V = sequence.completion.prompt_logits
        if source is not None and logits_1V is not None:
            self._take_row(sequence, self.cache.fork_row(source, len(sequence.ids)))
        else:
            row = self.cache.add_row()
            self._take_row(sequence, row)
            logits_1V = self._forward(row, [sequence.ids], [sequence])
            if len(sequence.completion.sequences) > 1 and not sequence.made_tokens:
                sequence.completion.prompt_logits = logits_1V
        self._accept([sequence], logits_1V)

    def decode(self) -> list[Sequence]:
        """One new token for every row; returns those. Rows without room go back to the line first."""
        while not self.cache.reserve(len(self.rows), min(self.cache.longest + 1, self.context_length)):
            self._preempt()
        rows = list(self.rows)
        logits_BV = self._forward(0, [sequence.ids[-1:] for sequence in rows], rows)
        self._accept(rows, logits_BV)
        return rows

    def leave(self, sequence: Sequence) -> None:
        """Free the sequence's adapter and its row, if it has one; the last row takes its place."""
        self.adapters.release(sequence.adapter)
        sequence.adapter = None
        row = sequence.row
        if row is None:
            return
        self.cache.remove_row(row)
        last = self.rows.pop()
        if last is not sequence:
            self.rows[row], last.row = last, row
        self._age.remove(sequence)
        sequence.row = None

    def drop(self, completion: Completion) -> None:
        """Take all of a completion's sequences out of the line and the batch."""
        self.queue.remove(completion)
        for sequence in completion.sequences:
            self.leave(sequence)
        completion.prompt_logits = None

    def _forward(self, first: int, ids: list[list[int]], rows: list[Sequence]) -> Tensor:
        """Logits BV of the last position, after writing `ids` (all of one length T) behind each row."""
        ids_BT = torch.tensor(ids, device=self._device)
        count = ids_BT.shape[1]
        step = self.cache.begin(first, len(ids), new_tokens=count)
        positions_BT = step.starts_B[:, None] + torch.arange(count, device=self._device)
        mask_B11L = None  # plain causal attention
        if not step.uniform:
            keys_L = torch.arange(step.longest + 1, device=self._device)
            mask_B11L = (keys_L <= step.starts_B[:, None])[:, None, None, :]
        self.adapters.route([sequence.adapter or BASE for sequence in rows], one_token=count == 1)
        output = self.model(
            input_ids=ids_BT,
            position_ids=positions_BT,
            attention_mask=mask_B11L,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits_BV: Tensor = output.logits[:, -1]
        return logits_BV

    def _accept(self, rows: list[Sequence], logits_BV: Tensor) -> None:
        """Choose and hand over one token per row; finished rows leave."""
        ids = choose_tokens(logits_BV, [sequence.chooser for sequence in rows])
        for sequence, token_id in zip(rows, ids, strict=True):
            if token_id < 0:
                sequence.completion.broken = True
                continue
            sequence.accept(token_id)
            if sequence.reason is not None:
                self.leave(sequence)

    def _take_row(self, sequence: Sequence, row: int) -> None:
        sequence.row = row
        self.rows.append(sequence)
        self._age.append(sequence)

    def _preempt(self) -> None:
        youngest = self._age[-1]
        self.leave(youngest)
        self.queue.push_front(youngest)
        self.preemptions += 1

    def _row_with_prompt(self, sequence: Sequence) -> int | None:
        """Row of another choice of the same request; None if there is none or this one has gone further."""
        if sequence.made_tokens:
            return None
        siblings = sequence.completion.sequences
        return next((other.row for other in siblings if other.row is not None), None)


def refuse_special_attention(model: PreTrainedModel) -> None:
    """Raise ValueError for models whose cache is not simply all keys and values (sliding windows, Mamba)."""
    config = model.config
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if layer_types != {"full_attention"} or getattr(config, "sliding_window", None) is not None:
        raise ValueError(f"{config.model_type} models with special attention layers cannot be batched here")


def _adapter_of(completion: Completion) -> TunedWeights | None:
    tuned = completion.request.tuned
    return tuned if tuned is not None and tuned.kind is WeightsKind.LORA else None

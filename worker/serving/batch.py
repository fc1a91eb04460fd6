"""One model and the sequences that run on it together: they join and leave between two steps.

A new sequence is computed by itself (prefill, exact), some tokens between two steps of the others, then its
row joins them, whatever adapter each row uses. A few projects' prompts are computed side by side, so that a
long one delays no other project's first token. What another prompt of the same project and weights began
with is not computed again. When the memory for keys and values is full, the youngest row gives its place back
and is computed again later.
Knows models, rows and adapters; nothing of threads, requests' words or the world outside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from torch import Tensor

from app.core.completions import TunedWeights, WeightsKind
from worker.serving.adapter_files import ModelUnavailable
from worker.serving.adapters import BASE, AdapterSet
from worker.serving.attention import use_row_attention
from worker.serving.cache import SlotCache
from worker.serving.forward import forward
from worker.serving.linears import pack_linears
from worker.serving.prefixes import BLOCK, PrefixCache, block_names
from worker.serving.sampling import choose_tokens
from worker.serving.scheduler import FairQueue, project_of
from worker.serving.sequence import Completion, Sequence

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEADROOM = 64  # tokens a new row must be able to grow, so that it is not sent back at once
FILLING = 4  # projects whose prompts are computed side by side; more would cut each step's tokens too small
SMALLEST_CONTEXT = 256  # tokens; a model that can hold no more is of no use


class CannotBegin(Exception):
    """A waiting sequence's adapter cannot be loaded."""

    def __init__(self, sequence: Sequence, reason: ModelUnavailable) -> None:
        super().__init__(str(reason))
        self.sequence = sequence
        self.reason = reason


@dataclass(frozen=True, slots=True)
class GroupLimits:
    """What one model may hold at once."""

    max_batch: int  # rows
    kv_bytes: int  # keys and values of all rows, each as long as the longest
    adapter_bytes: int  # adapters in memory
    prefix_bytes: int = 0  # known beginnings of prompts


class ModelGroup:
    """A model, its waiting line and its running batch; row i of the cache belongs to `rows[i]`.

    `fillings`: sequences whose prompts are computed in part, one a project at most; their rows are behind all
    others. `context_length`: tokens of the longest sequence, the model's own or as many as the budget holds.
    """

    def __init__(
        self, model: PreTrainedModel, limits: GroupLimits, *, on_read: Callable[[], None] = lambda: None
    ) -> None:
        refuse_special_attention(model)
        use_row_attention(model)
        pack_linears(model)
        self.model = model
        max_tokens = limits.kv_bytes // token_bytes(model)
        self.context_length = min(int(model.config.max_position_embeddings), max_tokens)
        if self.context_length < min(SMALLEST_CONTEXT, model.config.max_position_embeddings):
            raise ValueError(
                f"{limits.kv_bytes} bytes for keys and values hold {max_tokens} tokens of this model; give "
                f"it at least {SMALLEST_CONTEXT * token_bytes(model)} (LUTHIER_KV_CACHE_MB)"
            )
        self.adapters = AdapterSet(
            model, budget_bytes=limits.adapter_bytes, max_slots=limits.max_batch, on_read=on_read
        )
        self._max_batch = limits.max_batch
        self.cache = SlotCache(
            model.config.num_hidden_layers,
            max_rows=limits.max_batch,
            max_tokens=max_tokens,
            device=model.device,
        )
        self.prefixes = PrefixCache(limits.prefix_bytes)
        self.queue = FairQueue()
        self.fillings: list[Sequence] = []
        self.rows: list[Sequence] = []
        self._age: list[Sequence] = []  # running sequences, oldest first
        self.preemptions = 0

    @property
    def idle(self) -> bool:
        """Nothing runs and nothing waits."""
        return not self.rows and not self.queue and not self.fillings

    def admit(self) -> Sequence | None:
        """Give the next waiting sequence a place, if there is one and it fits; `prefill` begins it.

        A project that fills a row waits for its next. One whose adapter is just being read lets those behind
        it go first, for that is soon over; for want of memory nobody is overtaken. Raises CannotBegin; that
        sequence stays in line.
        """
        if len(self.fillings) >= FILLING:
            return None
        busy = {project_of(sequence) for sequence in self.fillings}
        for sequence in islice(self.queue, self._max_batch):
            if project_of(sequence) in busy:
                continue
            length = min(max(len(sequence.ids), self._longest) + HEADROOM, self.context_length)
            if not self.cache.reserve(len(self.cache.lengths) + 1, length):
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

    def begin(self, sequence: Sequence) -> None:
        """Give an admitted sequence its row: one that is filled by `prefill`, or at once, as a sibling's."""
        source = self._row_with_prompt(sequence)
        logits_1V = sequence.completion.prompt_logits
        if source is not None and logits_1V is not None:
            self._join(sequence, self.cache.fork_row(source, len(sequence.ids)))
            self._accept([sequence], logits_1V)
            return
        sequence.row = self.cache.add_row()
        self.fillings.append(sequence)
        self._reuse(sequence, sequence.row)

    def prefill(self, sequence: Sequence, limit: int | None = None) -> int:
        """Compute at most `limit` tokens of a sequence that has begun; returns how many, O(T).

        With the last of them comes its first new token, and its row joins the others.
        """
        row = sequence.row
        assert row is not None
        start = self.cache.lengths[row]
        ids = sequence.ids[start : None if limit is None else start + limit]
        logits_1V = self._forward(row, [ids], [sequence])
        if start + len(ids) == len(sequence.ids):
            if len(sequence.completion.sequences) > 1 and not sequence.made_tokens:
                sequence.completion.prompt_logits = logits_1V
            self._keep(sequence, row, logits_1V)
            self.fillings.remove(sequence)
            self._join(sequence, row)
            self._accept([sequence], logits_1V)
        return len(ids)

    def missing(self, sequence: Sequence) -> int:
        """Tokens of a filling sequence that are not computed yet."""
        assert sequence.row is not None
        return len(sequence.ids) - self.cache.lengths[sequence.row]

    def decode(self) -> list[Sequence]:
        """One new token for every row; returns those. Rows without room go back to the line first."""
        while not self.cache.reserve(len(self.cache.lengths), min(self._longest + 1, self.context_length)):
            self._preempt()
        rows = list(self.rows)
        if rows:
            logits_BV = self._forward(0, [sequence.ids[-1:] for sequence in rows], rows)
            self._accept(rows, logits_BV)
        return rows

    def leave(self, sequence: Sequence) -> None:
        """Free the sequence's adapter and its row, if it has one; the last row takes its place."""
        self.adapters.release(sequence.adapter)
        sequence.adapter = None
        row, sequence.row = sequence.row, None
        if row is None:
            return
        if sequence in self.fillings:
            self.fillings.remove(sequence)
            self._free(row)
            return
        last = self.rows.pop()
        if last is not sequence:
            self.cache.replace_row(row, len(self.rows))
            self.rows[row], last.row = last, row
        self._free(len(self.rows))
        self._age.remove(sequence)

    def abandon(self) -> None:
        """Forget all rows, and what was kept of prompts, after a failure."""
        self.fillings.clear()
        self.prefixes.clear()
        self.cache.clear()

    def drop(self, completion: Completion) -> None:
        """Take all of a completion's sequences out of the line and the batch."""
        self.queue.remove(completion)
        for sequence in completion.sequences:
            self.leave(sequence)
        completion.prompt_logits = None

    def _forward(self, first: int, ids: list[list[int]], rows: list[Sequence]) -> Tensor:
        """Logits BV of the last position, after writing `ids` (all of one length T) behind each row."""
        self.adapters.route([sequence.adapter or BASE for sequence in rows], one_token=len(ids[0]) == 1)
        return forward(self.model, self.cache, ids, first=first)[:, -1]

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

    def _reuse(self, sequence: Sequence, row: int) -> None:
        """Begin with what is known of its tokens; the last one is always computed, for its logits."""
        names = block_names(_owner(sequence), sequence.ids[:-1])
        for block in self.prefixes.find(names):
            self.cache.append_tokens(row, block)
        if not sequence.made_tokens:
            sequence.completion.cached_tokens = self.cache.lengths[row]

    def _keep(self, sequence: Sequence, row: int, logits_1V: Tensor) -> None:
        """Remember a computed prompt, unless it came to something that is not a number."""
        if not bool(logits_1V.isfinite().all()):
            return
        for index, name in enumerate(block_names(_owner(sequence), sequence.completion.prompt_ids)):
            if name not in self.prefixes:
                self.prefixes.add(name, self.cache.read_tokens(row, index * BLOCK, BLOCK))

    @property
    def _longest(self) -> int:
        """Tokens of the longest row, prompts that are being filled counted whole."""
        return max([self.cache.longest, *(len(sequence.ids) for sequence in self.fillings)])

    def _join(self, sequence: Sequence, row: int) -> None:
        """Let a row that is ready run: it moves before those that are being filled."""
        place = len(self.rows)
        if row != place:
            self.cache.swap_rows(place, row)
            self._moved(place, row)
        sequence.row = place
        self.rows.append(sequence)
        self._age.append(sequence)

    def _free(self, row: int) -> None:
        """Give a row behind the running ones back; the last one takes its place."""
        self.cache.remove_row(row)
        self._moved(len(self.cache.lengths), row)

    def _moved(self, source: int, target: int) -> None:
        for sequence in self.fillings:
            if sequence.row == source:
                sequence.row = target
                return

    def _preempt(self) -> None:
        youngest = (self.fillings or self._age)[-1]
        self.leave(youngest)
        self.queue.push_front(youngest)
        self.preemptions += 1

    def _row_with_prompt(self, sequence: Sequence) -> int | None:
        """Row of another choice of the same request; None if there is none or this one has gone further."""
        if sequence.made_tokens:
            return None
        siblings = sequence.completion.sequences
        return next((other.row for other in siblings if other.row is not None), None)


def token_bytes(model: PreTrainedModel) -> int:
    """Memory of one token's keys and values over all layers, as `SlotCache` holds them."""
    config = model.config
    heads: int = config.num_attention_heads
    kv_heads: int = getattr(config, "num_key_value_heads", None) or heads
    size: int = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * int(config.num_hidden_layers) * kv_heads * size * model.dtype.itemsize


def refuse_special_attention(model: PreTrainedModel) -> None:
    """Raise ValueError for models whose cache is not simply all keys and values (sliding windows, Mamba)."""
    config = model.config
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if layer_types != {"full_attention"} or getattr(config, "sliding_window", None) is not None:
        raise ValueError(f"{config.model_type} models with special attention layers cannot be batched here")


def _owner(sequence: Sequence) -> tuple[str, str]:
    """Whose prefixes it may use: those of its project on its weights."""
    return sequence.completion.request.project_id, sequence.adapter or BASE


def _adapter_of(completion: Completion) -> TunedWeights | None:
    tuned = completion.request.tuned
    return tuned if tuned is not None and tuned.kind is WeightsKind.LORA else None

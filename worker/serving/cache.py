"""Keys and values of all running sequences, one row each, every row with its own length.

Rows 0..B-1 are in use and lie side by side, so a decoding step reads plain views and gathers nothing; a mask
hides what lies behind a row's end. Buffers grow on demand, never beyond a budget of tokens (rows x longest).
It presents itself to the model as a transformers `Cache`. It knows nothing of requests, adapters or text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

LENGTH_STEP = 64  # buffers grow to multiples of this many tokens
GROWTH = 1.5  # and by at least this factor, so that copies stay rare


class Step:
    """What the coming forward pass writes: T tokens of the rows `first`..`first+count-1`.

    `starts`: tokens each of those rows holds already. `longest`: the largest of them.
    """

    def __init__(self, first: int, starts: list[int], device: torch.device) -> None:
        self.first = first
        self.count = len(starts)
        self.starts = starts
        self.longest = max(starts)
        self.uniform = min(starts) == self.longest
        self.rows_B = torch.arange(first, first + self.count, device=device)
        self.starts_B = torch.tensor(starts, device=device)


class SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one layer, RHLD each: rows, heads, length, head size."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys_RHLD = self.values_RHLD = torch.empty(0)
        self.rows = 0
        self.length = 0
        self.step: Step | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate as reserved; heads, sizes and dtype are only known from the first keys.

        Zeros, not garbage: a masked position weighs exactly 0, but 0 x NaN would still be NaN.
        """
        shape = (self.rows, key_states.shape[1], self.length)
        self.keys_RHLD = key_states.new_zeros((*shape, key_states.shape[3]))
        self.values_RHLD = value_states.new_zeros((*shape, value_states.shape[3]))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new keys and values (BHTD) at each row's own end; return views up to the longest row."""
        step = self.step
        assert step is not None
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[2]
        rows, end = slice(step.first, step.first + step.count), step.longest + new
        if step.uniform:
            self.keys_RHLD[rows, :, step.longest : end] = key_states
            self.values_RHLD[rows, :, step.longest : end] = value_states
        else:  # one token per row, each at its own place
            self.keys_RHLD[step.rows_B, :, step.starts_B] = key_states[:, :, 0]
            self.values_RHLD[step.rows_B, :, step.starts_B] = value_states[:, :, 0]
        return self.keys_RHLD[rows, :, :end], self.values_RHLD[rows, :, :end]

    def resize(self, rows: int, length: int, *, used_rows: int, used_length: int) -> None:
        """Move to buffers of another size, keeping what is in use."""
        self.rows, self.length = rows, length
        if not self.is_initialized:
            return
        for name in ("keys_RHLD", "values_RHLD"):
            old: Tensor = getattr(self, name)
            new = old.new_zeros((rows, old.shape[1], length, old.shape[3]))
            new[:used_rows, :, :used_length] = old[:used_rows, :, :used_length]
            setattr(self, name, new)

    def copy_row(self, source: int, target: int, *, length: int, old_length: int) -> None:
        """Make `target` hold the first `length` tokens of `source` and zeros up to its `old_length`."""
        if not self.is_initialized:
            return
        for buffer in (self.keys_RHLD, self.values_RHLD):
            if source != target:
                buffer[target, :, :length] = buffer[source, :, :length]
            buffer[target, :, length:old_length] = 0

    def swap_rows(self, one: int, other: int, *, length: int) -> None:
        """Exchange the first `length` tokens of two rows; neither holds more."""
        if not self.is_initialized:
            return
        for buffer in (self.keys_RHLD, self.values_RHLD):
            kept = buffer[one, :, :length].clone()
            buffer[one, :, :length] = buffer[other, :, :length]
            buffer[other, :, :length] = kept

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys the mask must cover."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens the longest row of the coming step holds already."""
        return self.step.longest if self.step is not None else 0

    def get_max_length(self) -> int:
        """No limit of its own; `SlotCache.reserve` keeps the budget."""
        return -1


class SlotCache(Cache):
    """All layers' rows, their lengths and the budget: rows x longest row never exceeds `max_tokens`."""

    def __init__(self, layer_count: int, *, max_rows: int, max_tokens: int, device: torch.device) -> None:
        self.slots = [SlotLayer() for _ in range(layer_count)]
        super().__init__(layers=list(self.slots))
        self.max_rows = max_rows
        self.max_tokens = max_tokens
        self.device = device
        self.lengths: list[int] = []  # tokens each row in use holds
        self.row_capacity = 0
        self.length_capacity = 0

    def reserve(self, rows: int, length: int) -> bool:
        """Make room for `rows` rows of up to `length` tokens; False if that breaks the budget."""
        if rows > self.max_rows or rows * length > self.max_tokens:
            return False
        if rows <= self.row_capacity and length <= self.length_capacity:
            return True
        new_rows = min(self.max_rows, max(rows, self.row_capacity))
        if rows > self.row_capacity:
            new_rows = min(self.max_rows, max(rows, 2 * self.row_capacity))
        new_length = self.length_capacity
        if length > self.length_capacity:
            new_length = _round_up(max(length, int(GROWTH * self.length_capacity)))
        if new_rows * new_length > self.max_tokens:
            new_rows, new_length = rows, min(_round_up(length), self.max_tokens // rows)
        for layer in self.slots:
            layer.resize(new_rows, new_length, used_rows=len(self.lengths), used_length=self.longest)
        self.row_capacity, self.length_capacity = new_rows, new_length
        return True

    @property
    def longest(self) -> int:
        """Tokens of the longest row in use."""
        return max(self.lengths, default=0)

    @property
    def capacity(self) -> int:
        """Tokens there is memory for."""
        return self.row_capacity * self.length_capacity

    def begin(self, first: int, count: int, *, new_tokens: int) -> Step:
        """Prepare for a forward pass that adds `new_tokens` to each of rows `first`..`first+count-1`.

        They count as held from now on, so that whatever a failing pass leaves behind is zeroed too.
        """
        step = Step(first, self.lengths[first : first + count], self.device)
        for layer in self.slots:
            layer.step = step
        for row in range(first, first + count):
            self.lengths[row] += new_tokens
        return step

    def add_row(self) -> int:
        """Take the next free row, empty; `reserve` must have made room."""
        self.lengths.append(0)
        return len(self.lengths) - 1

    def fork_row(self, source: int, length: int) -> int:
        """Take the next free row and fill it with the first `length` tokens of `source`."""
        target = len(self.lengths)
        for layer in self.slots:
            layer.copy_row(source, target, length=length, old_length=length)
        self.lengths.append(length)  # last: a copy that failed has taken no row
        return target

    def replace_row(self, row: int, source: int) -> None:
        """Make `row` hold what `source` holds, and nothing of what it held."""
        for layer in self.slots:
            layer.copy_row(source, row, length=self.lengths[source], old_length=self.lengths[row])
        self.lengths[row] = self.lengths[source]

    def swap_rows(self, one: int, other: int) -> None:
        """Let two rows change places."""
        length = max(self.lengths[one], self.lengths[other])
        for layer in self.slots:
            layer.swap_rows(one, other, length=length)
        self.lengths[one], self.lengths[other] = self.lengths[other], self.lengths[one]

    def read_tokens(self, row: int, start: int, count: int) -> Tensor:
        """A copy of the keys and values of `count` tokens: layers, 2, heads, tokens, head size."""
        part = slice(start, start + count)
        return torch.stack(
            [
                torch.stack((layer.keys_RHLD[row, :, part], layer.values_RHLD[row, :, part]))
                for layer in self.slots
            ]
        )

    def append_tokens(self, row: int, tokens: Tensor) -> None:
        """Put what `read_tokens` gave behind a row's end; the row has room."""
        start = self.lengths[row]
        part = slice(start, start + tokens.shape[3])
        for layer, (keys_HTD, values_HTD) in zip(self.slots, tokens, strict=True):
            layer.keys_RHLD[row, :, part] = keys_HTD
            layer.values_RHLD[row, :, part] = values_HTD
        self.lengths[row] = part.stop

    def remove_row(self, row: int) -> None:
        """Free `row`; the last row in use takes its place. The freed memory is zeroed.

        Zeroing keeps what a broken adapter may have left (NaN) out of the next user of that row.
        """
        last = len(self.lengths) - 1
        for layer in self.slots:
            if row != last:
                layer.copy_row(last, row, length=self.lengths[last], old_length=self.lengths[row])
            layer.copy_row(last, last, length=0, old_length=self.lengths[last])
        self.lengths[row] = self.lengths[last]
        self.lengths.pop()

    def clear(self) -> None:
        """Forget every row and give all memory back."""
        for layer in self.slots:
            layer.keys_RHLD = layer.values_RHLD = torch.empty(0)
            layer.is_initialized = False
            layer.rows = layer.length = 0
        self.lengths.clear()
        self.row_capacity = self.length_capacity = 0


def _round_up(length: int) -> int:
    return -(-length // LENGTH_STEP) * LENGTH_STEP

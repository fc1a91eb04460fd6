"""Low-rank layers beside the base model's own: each row of a batch goes through the adapter it asked for.

The weights of the adapters in use lie stacked in slots, a stack per layer and rank bucket. Rows are grouped
by slot, so a forward pass reads each adapter's weights once, in a few batched products, and copies none of
them (the grouped products of Punica, Chen et al. 2023, and S-LoRA, Sheng et al. 2023, in plain torch). Rows
without an adapter pass untouched. Knows tensors and slots, neither files nor requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

SMALLEST_BUCKET = 8  # ranks are padded with zeros to powers of two, at least this
PADDING_MAX = 4  # batched products may compute so many times the batch's rows, else slots go one by one


class Factors(NamedTuple):
    """One layer's share of an adapter: `x_I @ down @ up`, LoRA's scaling already in `up`."""

    down: Tensor  # IR
    up: Tensor  # RO


class Place(NamedTuple):
    """Where an adapter's weights are: bucket of its largest rank, slot in the stacks of that bucket."""

    bucket: int
    slot: int


def bucket_of(rank: int) -> int:
    """The padded rank of an adapter of this rank."""
    return max(SMALLEST_BUCKET, 1 << (rank - 1).bit_length())


class Stack:
    """Slots of one layer: `down_SIR`, `up_SRO`."""

    def __init__(self, slots: int, bucket: int, *, sizes: tuple[int, int], like: Tensor) -> None:
        # zeros, not empty: an adapter that does not touch this layer finds its slot harmless. On Linux
        # memory nobody has written to costs nothing.
        self.down_SIR = like.new_zeros((slots, sizes[0], bucket))
        self.up_SRO = like.new_zeros((slots, bucket, sizes[1]))

    def write(self, slot: int, factors: Factors | None) -> None:
        """Put factors into a slot; None for an adapter that leaves this layer alone."""
        rank = 0 if factors is None else factors.down.shape[1]
        if factors is not None:
            self.down_SIR[slot, :, :rank] = factors.down
            self.up_SRO[slot, :rank] = factors.up
        self.down_SIR[slot, :, rank:] = 0
        self.up_SRO[slot, rank:] = 0


@dataclass(slots=True)
class OneSlot:
    """Rows of one adapter. `rows` (N) None: all rows of the batch."""

    bucket: int
    slot: int
    rows: Tensor | None

    def add(self, y_BTO: Tensor, x_BTI: Tensor, stack: Stack) -> None:
        """y += x @ down @ up for these rows."""
        down_IR, up_RO = stack.down_SIR[self.slot], stack.up_SRO[self.slot]
        if self.rows is None:
            y_BTO += (x_BTI @ down_IR) @ up_RO
        else:
            y_BTO.index_add_(0, self.rows, (x_BTI.index_select(0, self.rows) @ down_IR) @ up_RO)


class ManySlots:
    """Rows of the adapters in slots 0..K-1, P places each; places without a row repeat one, unread.

    Only for one new token per row (T = 1).
    """

    def __init__(self, bucket: int, slots: list[int], rows: list[int], device: torch.device) -> None:
        self.bucket = bucket
        self.count = max(slots) + 1
        filled = [0] * self.count
        places: list[int] = []
        self.width = max(slots.count(slot) for slot in set(slots))
        gather = [rows[0]] * (self.count * self.width)
        for slot, row in zip(slots, rows, strict=True):
            place = slot * self.width + filled[slot]
            filled[slot] += 1
            gather[place] = row
            places.append(place)
        self._gather_KP = torch.tensor(gather, device=device)
        self._places_N = torch.tensor(places, device=device)
        self._rows_N = torch.tensor(rows, device=device)
        self._last_x: Tensor | None = None  # layers side by side (q, k, v) read the same rows
        self._last_KPI = torch.empty(0)

    def add(self, y_BTO: Tensor, x_BTI: Tensor, stack: Stack) -> None:
        """y += x @ down @ up, each row with its own slot's factors."""
        if self._last_x is not x_BTI:
            rows_KI = x_BTI[:, 0].index_select(0, self._gather_KP)
            self._last_x, self._last_KPI = x_BTI, rows_KI.view(self.count, self.width, -1)
        middle_KPR = torch.bmm(self._last_KPI, stack.down_SIR[: self.count])
        added_KPO = torch.bmm(middle_KPR, stack.up_SRO[: self.count])
        y_BTO[:, 0].index_add_(0, self._rows_N, added_KPO.flatten(0, 1).index_select(0, self._places_N))


class Route:
    """Which rows of the coming forward passes use which slots; all layers of a model share one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known: list[Place | None] = []
        self.parts: list[OneSlot | ManySlots] = []

    def set(self, places: Sequence[Place | None], *, one_token: bool) -> None:
        """Say where each row's adapter is; None for rows of the base. Several tokens: one row a slot."""
        known = [*places, None] if one_token else list(places)  # a batch of both kinds is not the same
        if known == self._known:
            return
        self._known, self.parts = known, []
        for bucket in sorted({place.bucket for place in places if place is not None}):
            found = [(row, p.slot) for row, p in enumerate(places) if p is not None and p.bucket == bucket]
            rows, slots = [row for row, _ in found], [slot for _, slot in found]
            if one_token and _worth_batching(slots, len(places)):
                self.parts.append(ManySlots(bucket, slots, rows, self._device))
            else:
                self.parts += self._one_by_one(bucket, slots, rows, len(places))

    def _one_by_one(self, bucket: int, slots: list[int], rows: list[int], batch: int) -> list[OneSlot]:
        parts = []
        for slot in sorted(set(slots)):
            own = [row for row, other in zip(rows, slots, strict=True) if other == slot]
            rows_N = None if len(own) == batch else torch.tensor(own, device=self._device)
            parts.append(OneSlot(bucket, slot, rows_N))
        return parts


class LoraLayer(nn.Module):
    """A base layer and its stacks. Adds to a row what that row's adapter says, to no other row."""

    def __init__(self, base: nn.Module, route: Route, *, sizes: tuple[int, int]) -> None:
        super().__init__()
        self.base = base
        self.sizes = sizes  # in, out
        self.stacks: dict[int, Stack] = {}
        self._route = route

    def forward(self, x_BTI: Tensor) -> Tensor:
        """The base layer's output with the adapters' parts added."""
        y_BTO: Tensor = self.base(x_BTI)
        for part in self._route.parts:
            stack = self.stacks.get(part.bucket)
            if stack is not None:
                part.add(y_BTO, x_BTI, stack)
        return y_BTO


def _worth_batching(slots: list[int], batch: int) -> bool:
    """Batched products read all slots up to the highest and pad all to the widest; else one by one.

    Measured with SmolLM2-135M, r=16, 32 rows, one core: 8 adapters 16 ms a step batched, 25 one by one; 32
    adapters 36 and 86.
    """
    used, count = len(set(slots)), max(slots) + 1
    width = max(slots.count(slot) for slot in set(slots))
    return used > 1 and count <= 2 * used and count * width <= max(PADDING_MAX * batch, 8)

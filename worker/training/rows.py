"""Examples as rows of the prediction of memory: lengths, and what rows that begin alike share. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from app.core.memory import Row
from worker.training.tree import common_tokens


def rows_of(encoded: Sequence[tuple[list[int], int]], *, shares: bool) -> tuple[Row, ...]:
    """One row for each (token ids, count of labels); `shares`: rows that begin alike are computed once."""
    if not shares or not encoded:
        return tuple(Row(len(ids), len(ids), labels) for ids, labels in encoded)
    ordered = sorted(encoded, key=lambda one: one[0])
    common = [common_tokens(one[0], other[0]) for one, other in pairwise(ordered)]
    return tuple(
        _row(ids, labels, before, after)
        for (ids, labels), before, after in zip(ordered, [0, *common], [*common, 0], strict=True)
    )


def _row(ids: Sequence[int], labels: int, before: int, after: int) -> Row:
    shared = max(before, after)
    branch = max(1, len(ids) - shared) if shared else 0
    return Row(len(ids), max(1, len(ids) - before), labels, branch)

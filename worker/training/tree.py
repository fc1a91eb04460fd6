"""Rows that begin alike as a tree whose branches stand for tokens computed once (Tree Training, 2025).

Causal attention makes the same tokens after the same tokens the same numbers, forward; backward, what all
rows below a branch ask of it adds up by itself. Knows lists of token ids and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

# A branch costs each layer one more call of attention and a copy of keys: the time of a token or two.
WORTH_TOKENS = 8


@dataclass(slots=True)
class Tree:
    """Branches in an order in which parents stand before their children, laid end to end.

    Row i is the branches `paths[i]`, one after the other.
    """

    parents: list[int] = field(default_factory=list)  # -1: none
    starts: list[int] = field(default_factory=list)  # position in the row of a branch's first token
    lengths: list[int] = field(default_factory=list)  # tokens
    offsets: list[int] = field(default_factory=list)  # of the first token in the whole layout
    paths: list[tuple[int, ...]] = field(default_factory=list)

    def places(self, row: int) -> list[int]:
        """Where each token of a row stands in the layout."""
        return [self.offsets[branch] + at for branch in self.paths[row] for at in range(self.lengths[branch])]

    def add(self, path: tuple[int, ...], start: int, end: int) -> tuple[int, ...]:
        """Grow a branch of the tokens `start` to `end` at the tip of `path`; returns the longer path."""
        last = len(self.lengths) - 1
        self.offsets.append(self.offsets[last] + self.lengths[last] if self.lengths else 0)
        self.parents.append(path[-1] if path else -1)
        self.starts.append(start)
        self.lengths.append(end - start)
        return (*path, last + 1)


def single_branches(rows: Sequence[Sequence[int]]) -> Tree:
    """The tree in which nothing is shared."""
    tree = Tree()
    for row in rows:
        tree.paths.append(tree.add((), 0, len(row)))
    return tree


def shared_branches(rows: Sequence[list[int]]) -> Tree:
    """The tree in which rows (none empty) share what they begin with, where that saves enough tokens."""
    tree = Tree(paths=[()] * len(rows))
    order = sorted(range(len(rows)), key=lambda row: rows[row])
    waiting: list[tuple[list[int], int, tuple[int, ...]]] = [(order, 0, ())]
    while waiting:
        group, start, path = waiting.pop()
        common = common_tokens(rows[group[0]], rows[group[-1]])  # sorted: the ends differ first
        if len(group) == 1 or (common - start) * (len(group) - 1) >= WORTH_TOKENS:
            if common > start:
                path = tree.add(path, start, common)
            start = common
        for row in group:
            if len(rows[row]) == common:  # nothing of its own beyond
                tree.paths[row] = tree.add(path, start, common) if common > start else path
        longer = [row for row in group if len(rows[row]) > common]
        children = [list(same) for _, same in groupby(longer, key=lambda row: rows[row][common])]
        waiting += [(child, start, path) for child in reversed(children)]
    return tree


def common_tokens(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))

"""Shared beginnings become branches: every row can be read off them, and no token stands there twice."""

from __future__ import annotations

import random

import pytest

from worker.training.tree import WORTH_TOKENS, Tree, shared_branches, single_branches


def read(tree: Tree, rows: list[list[int]]) -> list[list[int]]:
    """The rows as the layout holds them."""
    layout: dict[int, int] = {}
    for number, row in enumerate(rows):
        for place, token in zip(tree.places(number), row, strict=True):
            assert layout.setdefault(place, token) == token
    assert sorted(layout) == list(range(sum(tree.lengths)))
    return [[layout[place] for place in tree.places(number)] for number in range(len(rows))]


def check(tree: Tree, rows: list[list[int]]) -> None:
    assert read(tree, rows) == rows
    for branch, parent in enumerate(tree.parents):
        assert parent < branch
        assert tree.starts[branch] == (0 if parent < 0 else tree.starts[parent] + tree.lengths[parent])
        assert tree.lengths[branch] > 0


@pytest.mark.parametrize("seed", range(40))
def test_any_rows_can_be_read_off_their_tree(seed: int) -> None:
    rng = random.Random(seed)
    rows: list[list[int]] = [[0]]
    for _ in range(rng.randrange(1, 30)):
        start = rng.choice(rows)
        row = start[: rng.randrange(len(start) + 1)]
        rows.append(row + [rng.randrange(3) for _ in range(rng.randrange(30) or not row)])
    rng.shuffle(rows)
    check(shared_branches(rows), rows)
    check(single_branches(rows), rows)


def test_each_depth_is_computed_once() -> None:
    system, turn, other = [1] * 20, [2] * 20, [3] * 20
    rows = [system + turn + [4], system + turn + [5, 6], system + other + [4], system + turn]
    tree = shared_branches(rows)
    check(tree, rows)
    assert sum(tree.lengths) == 20 + 20 + 1 + 2 + 21


def test_what_saves_too_little_is_computed_twice() -> None:
    few = [7] * (WORTH_TOKENS - 1)
    assert shared_branches([[*few, 1], [*few, 2]]).parents == [-1, -1]
    assert shared_branches([[*few, 1], [*few, 2], [*few, 3]]).parents == [-1, 0, 0, 0]


def test_rows_that_share_nothing_keep_a_branch_each() -> None:
    assert shared_branches([[1] * 30, [2] * 30, [3]]).parents == [-1, -1, -1]

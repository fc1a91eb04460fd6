"""Rows of any mix of adapters, ranks and layers get exactly what the plain formula says for each of them."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

from worker.serving.lora import Factors, LoraLayer, ManySlots, Place, Route, Stack, bucket_of

INPUTS, OUTPUTS, SLOTS = 24, 40, 12


class Bench:
    """One layer with adapters in its slots, and the formula to compare it with."""

    def __init__(self, ranks: list[int]) -> None:
        self.generator = torch.Generator().manual_seed(7)
        self.route = Route(torch.device("cpu"))
        self.base = nn.Linear(INPUTS, OUTPUTS)
        self.layer = LoraLayer(self.base, self.route, sizes=(INPUTS, OUTPUTS))
        self.factors: dict[Place, Factors] = {}
        for slot, rank in enumerate(ranks):
            self.put(Place(bucket_of(rank), slot), rank)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def put(self, place: Place, rank: int) -> None:
        factors = Factors(self.random(INPUTS, rank), self.random(rank, OUTPUTS))
        stacks = self.layer.stacks
        if place.bucket not in stacks:
            stacks[place.bucket] = Stack(
                SLOTS, place.bucket, sizes=(INPUTS, OUTPUTS), like=self.base.weight.detach()
            )
        stacks[place.bucket].write(place.slot, factors)
        self.factors[place] = factors

    def check(self, places: list[Place | None], tokens: int = 1) -> None:
        x_BTI = self.random(len(places), tokens, INPUTS)
        expected = self.base(x_BTI)
        for row, place in enumerate(places):
            if place is not None:
                expected[row] += x_BTI[row] @ self.factors[place].down @ self.factors[place].up
        self.route.set(places, one_token=tokens == 1)
        torch.testing.assert_close(self.layer(x_BTI), expected, rtol=1e-5, atol=1e-4)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("seed", range(30))
def test_any_mix_of_rows_is_exact(seed):
    choose = random.Random(seed)
    bench = Bench([choose.choice([1, 2, 7, 8, 9, 16, 30]) for _ in range(SLOTS)])
    known = [None, *choose.sample(list(bench.factors), choose.randint(1, SLOTS))]
    for _ in range(5):
        places = [choose.choice(known) for _ in range(choose.randint(1, 2 * SLOTS))]
        bench.check(places)


def test_rows_of_many_adapters_share_products():
    bench = Bench([4] * SLOTS)
    bench.check(list(bench.factors))
    assert [type(part) for part in bench.route.parts] == [ManySlots]


def test_one_busy_adapter_among_many_does_not_blow_the_batch_up():
    bench = Bench([4] * SLOTS)
    places = list(bench.factors)
    bench.check([places[0]] * 20 + places[1:])
    assert not any(isinstance(part, ManySlots) for part in bench.route.parts)


@pytest.mark.parametrize("place", ["adapter", "base"])
def test_a_prompt_of_many_tokens_goes_through_its_own_adapter(place):
    bench = Bench([4, 16])
    bench.check([list(bench.factors)[1] if place == "adapter" else None], tokens=9)


def test_a_batch_of_the_base_alone_costs_no_product():
    bench = Bench([4])
    bench.check([None, None])
    assert bench.route.parts == []


def test_an_adapter_of_lower_rank_in_a_used_slot_inherits_nothing():
    bench = Bench([8])
    (place,) = bench.factors
    bench.put(place, 2)
    bench.check([place, None])


def test_an_adapter_that_leaves_the_layer_alone_changes_nothing():
    bench = Bench([8, 8])
    first, second = bench.factors
    bench.layer.stacks[first.bucket].write(first.slot, None)
    bench.factors[first] = Factors(torch.zeros(INPUTS, 1), torch.zeros(1, OUTPUTS))
    bench.check([first, second, None])


def test_what_is_not_a_number_stays_with_its_own_rows():
    bench = Bench([8, 8])
    first, second = bench.factors
    bad = Factors(torch.full((INPUTS, 8), torch.nan), torch.full((8, OUTPUTS), torch.nan))
    bench.layer.stacks[first.bucket].write(first.slot, bad)
    bench.factors[first] = bad
    x_BTI = bench.random(3, 1, INPUTS)
    bench.route.set([first, second, None], one_token=True)
    assert [bool(row.isfinite().all()) for row in bench.layer(x_BTI)] == [False, True, True]

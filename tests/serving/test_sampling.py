"""Tokens are drawn from exactly the distribution that temperature and top-p define."""

from __future__ import annotations

import random

import torch

from worker.serving.sampling import NUCLEUS_GUESS, Chooser, choose_tokens, make_chooser


def draw(logits_V: torch.Tensor, count: int, *, temperature: float = 1.0, top_p: float = 1.0) -> torch.Tensor:
    """`count` draws as relative frequencies, shape V."""
    choosers = [make_chooser(temperature, top_p, seed=7, index=index) for index in range(count)]
    ids = choose_tokens(logits_V.expand(count, -1), choosers)
    return torch.bincount(torch.tensor(ids), minlength=len(logits_V)) / count


def test_temperature_zero_takes_the_most_likely_token():
    logits_BV = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    chosen = choose_tokens(logits_BV, [make_chooser(0.0, 1.0, seed=None, index=0)] * 5)
    assert chosen == logits_BV.argmax(-1).tolist()


def test_a_tiny_temperature_takes_the_most_likely_token_and_does_not_overflow():
    logits_V = torch.randn(300, generator=torch.Generator().manual_seed(0)) * 1000
    for temperature in (1e-3, 1e-9, 1e-300):
        chooser = make_chooser(temperature, 0.9, seed=1, index=0)
        assert choose_tokens(logits_V[None], [chooser]) == [int(logits_V.argmax())]


def test_frequencies_follow_the_softmax_at_each_temperature():
    logits_V = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0])
    for temperature in (0.5, 1.0, 2.0):
        frequencies_V = draw(logits_V, 5_000, temperature=temperature)
        # 4 standard deviations of a binomial with p = 0.5
        torch.testing.assert_close(frequencies_V, (logits_V / temperature).softmax(0), atol=0.0284, rtol=0)


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass_and_its_proportions():
    probabilities_V = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
    for top_p, kept in (
        (0.39, [1]),
        (0.41, [1, 3]),
        (0.69, [1, 3]),
        (0.71, [1, 3, 4]),
        (1.0, [0, 1, 2, 3, 4]),
    ):
        expected_V = torch.zeros(5)
        expected_V[kept] = probabilities_V[kept] / probabilities_V[kept].sum()
        frequencies_V = draw(probabilities_V.log(), 5_000, top_p=top_p)
        assert set(frequencies_V.nonzero().flatten().tolist()) == set(kept)
        torch.testing.assert_close(frequencies_V, expected_V, atol=0.0284, rtol=0)


def test_top_p_zero_takes_the_most_likely_token():
    logits_V = torch.tensor([0.1, 0.2, 0.15])
    assert draw(logits_V, 100, top_p=0.0).tolist() == [0.0, 1.0, 0.0]


def test_a_nucleus_larger_than_the_guess_is_still_exact():
    logits_V = torch.zeros(4 * NUCLEUS_GUESS)
    logits_V[: 2 * NUCLEUS_GUESS] = 1.0  # mass 0.73 in the first half
    seen = draw(logits_V, 4_000, top_p=0.7)
    assert seen[2 * NUCLEUS_GUESS :].sum() == 0
    assert (seen > 0).sum() > 1.9 * NUCLEUS_GUESS


def test_a_seed_repeats_itself_whoever_shares_the_batch():
    logits_V = torch.randn(500, generator=torch.Generator().manual_seed(1))
    alone, crowded = make_chooser(1.0, 0.9, seed=-5, index=1), make_chooser(1.0, 0.9, seed=-5, index=1)
    others = [make_chooser(0.7, 1.0, seed=None, index=0), make_chooser(0.0, 1.0, seed=3, index=0)]
    for _ in range(50):
        expected = choose_tokens(logits_V[None], [alone])
        assert choose_tokens(logits_V.expand(3, -1), [others[0], crowded, others[1]])[1:2] == expected


def test_choices_of_one_seed_differ():
    logits_V = torch.zeros(10_000)
    choosers = [make_chooser(1.0, 1.0, seed=1, index=index) for index in range(8)]
    assert len(set(choose_tokens(logits_V.expand(8, -1), choosers))) == 8


def test_a_row_that_is_not_numbers_is_told_apart_and_harms_no_neighbour():
    logits_BV = torch.zeros(3, 10)
    logits_BV[0, 4] = torch.nan
    logits_BV[1, 5] = 9.0
    logits_BV[2, 0] = torch.inf
    choosers = [make_chooser(1.0, 0.5, seed=1, index=index) for index in range(3)]
    assert choose_tokens(logits_BV, choosers) == [-1, 5, -1]


def test_the_smallest_random_number_never_draws_a_token_outside_the_nucleus():
    class Zero(random.Random):
        def random(self) -> float:
            return 0.0

    logits_1V = torch.tensor([[0.0, -torch.inf, 3.0, 1.0]])
    assert choose_tokens(logits_1V, [Chooser(1.0, 0.5, Zero())]) == [2]

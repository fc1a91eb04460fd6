"""Whose prompts are computed in a step: nobody waits for another project's long one."""

from __future__ import annotations

import pytest
import torch

from tests.serving.listener import Listener
from tests.serving.test_mixed_batches import make_group
from worker.serving.loop import Loop
from worker.serving.models import ModelSet
from worker.serving.outlet import Outlet

STEP_TOKENS = 16
HALF = STEP_TOKENS // 2
LONG = "Where is my order? " * 50  # 500 tokens


class Steps:
    """A loop that is driven by hand."""

    def __init__(self, tiny_dir) -> None:
        self.group, intake = make_group(tiny_dir, max_batch=6)
        models = ModelSet(self.group, load=None, max_full_models=0, on_loaded=lambda: None)
        self._outlet = Outlet()
        self._loop = Loop(intake, models, self._outlet, prefill_tokens=STEP_TOKENS)

    def open(self, request) -> Listener:
        listener = Listener(request)
        self._outlet.open(request.id, listener)
        self._loop.open(request)
        return listener

    def until_first_word(self, listener: Listener) -> int:
        for step in range(1, 200):
            self.step()
            if listener.words:
                return step
        raise AssertionError("no first word in 200 steps")

    @torch.inference_mode()
    def step(self) -> None:
        self._loop.step()

    @torch.inference_mode()
    def drop(self, request) -> None:
        self._loop.drop(request.id)


@pytest.fixture
def steps(tiny_dir) -> Steps:
    return Steps(tiny_dir)


def test_a_short_prompt_does_not_wait_for_another_projects_long_ones(steps, make_request):
    long = [steps.open(make_request(LONG, project_id="long", max_tokens=2)) for _ in range(5)]
    for _ in range(5):
        steps.step()
    (filling,) = steps.group.fillings
    before = steps.group.missing(filling)
    assert before > 300
    taken = 0
    for number in range(3):  # one after the other, while the first long one is still being filled
        request = make_request(project_id=f"short {number}", max_tokens=1)
        taken += steps.until_first_word(steps.open(request))
    assert taken <= 3 * -(-40 // HALF)  # half of each step was theirs
    assert filling in steps.group.fillings
    assert before - steps.group.missing(filling) >= taken * HALF  # and it went on meanwhile
    assert not any(listener.words for listener in long)


def test_a_projects_own_prompts_come_one_after_the_other(steps, make_request):
    first, second = (steps.open(make_request(text, max_tokens=1)) for text in (LONG, "Hello"))
    while not first.words:
        steps.step()
        assert len(steps.group.fillings) <= 1
        assert not second.words or first.words
    steps.until_first_word(second)


def test_a_step_computes_no_more_prompt_tokens_than_it_may(steps, make_request):
    for number in range(6):
        steps.open(make_request(LONG, project_id=f"proj {number}", max_tokens=1))
    while not steps.group.fillings:
        steps.step()
    for _ in range(20):
        before = {id(s): steps.group.missing(s) for s in steps.group.fillings}
        steps.step()
        done = [before[id(s)] - steps.group.missing(s) for s in steps.group.fillings]
        assert sum(done) == STEP_TOKENS
        assert max(done) - min(done) <= 1


def test_a_long_prompt_whose_client_leaves_makes_way_for_the_others(steps, make_request):
    requests = [make_request(LONG, project_id=f"proj {number}", max_tokens=3) for number in range(4)]
    listeners = [steps.open(request) for request in requests]
    for _ in range(10):
        steps.step()
    assert len(steps.group.fillings) == 4
    steps.drop(requests[1])
    for listener in (listeners[0], listeners[2], listeners[3]):
        while not listener.finished:
            steps.step()
    assert steps.group.idle
    assert steps.group.cache.lengths == []

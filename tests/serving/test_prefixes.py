"""What prompts of one project on the same weights share is computed once; nobody else can tell."""

from __future__ import annotations

import pytest
import torch

from worker.serving.engine import Engine
from worker.serving.prefixes import BLOCK, PrefixCache, block_names

SHARED = "Thank you very much! " * 12


@pytest.fixture
def engine(make_engine) -> Engine:
    return make_engine()


def cached(engine, ask, request) -> int:
    return ask(engine, request).wait().finished[0].cached_tokens


def test_a_shared_beginning_is_computed_once_and_counted(engine, make_request, ask):
    first = ask(engine, make_request(SHARED + "Hello", max_tokens=4)).wait()
    again = ask(engine, make_request(SHARED + "Hello", max_tokens=4)).wait()
    other = ask(engine, make_request(SHARED + "0123", max_tokens=4)).wait()
    assert first.finished[0].cached_tokens == 0
    for listener in (again, other):
        last = listener.finished[0]
        assert BLOCK <= last.cached_tokens < last.prompt_tokens
        assert last.cached_tokens % BLOCK == 0
    assert again.text() == first.text()


def test_no_other_project_finds_it(engine, make_request, ask):
    cached(engine, ask, make_request(SHARED, max_tokens=2))
    assert cached(engine, ask, make_request(SHARED, max_tokens=2, project_id="proj_2")) == 0


def test_no_other_weights_find_it(engine, make_request, ask, adapters):
    for tuned in (None, *adapters):
        assert cached(engine, ask, make_request(SHARED, max_tokens=2, tuned=tuned)) == 0
        assert cached(engine, ask, make_request(SHARED, max_tokens=2, tuned=tuned)) > 0


def test_an_engine_without_memory_for_it_keeps_nothing(make_engine, make_request, ask):
    engine = make_engine(prefix_bytes=0)
    for _ in range(2):
        assert cached(engine, ask, make_request(SHARED, max_tokens=2)) == 0


def test_what_nobody_used_for_longest_leaves():
    cache = PrefixCache(3 * 4)
    for name in (b"a", b"b", b"c"):
        cache.add(name, torch.zeros(1))
    cache.find([b"a"])
    cache.add(b"d", torch.zeros(1))
    assert [name in cache for name in (b"a", b"b", b"c", b"d")] == [True, False, True, True]
    assert cache.size_bytes == 12


def test_a_block_is_named_after_all_that_stands_before_it():
    one, other = list(range(BLOCK)) * 2, [7, *range(1, BLOCK), *range(BLOCK)]
    names = block_names(("p", "w"), one), block_names(("p", "w"), other)
    assert len(names[0]) == 2
    assert not set(names[0]) & set(names[1])
    assert block_names(("p", "w"), one[: BLOCK - 1]) == []
    assert not set(names[0]) & set(block_names(("q", "w"), one))


def test_a_long_prompt_lets_running_answers_go_on(make_engine, make_request, ask):
    """Between two parts of it every running answer gets its next token."""
    engine = make_engine(prefill_tokens=8)
    running = ask(engine, make_request(max_tokens=300))
    assert running.first.wait(10)
    made = engine.stats().made_tokens
    long = ask(engine, make_request("order " * 60, max_tokens=1)).wait()
    parts = long.finished[0].prompt_tokens // 8
    assert parts > 8
    assert engine.stats().made_tokens - made >= parts - 2 or running.done.is_set()
    running.wait()

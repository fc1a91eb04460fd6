"""Far more adapters in storage than in memory, asked for at random: right answers and no cliff."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from app.core.completions import TunedWeights
from tests.serving.listener import Listener
from worker.serving.adapter_files import read_adapter, weights_size_bytes

STORED, RESIDENT, REQUESTS = 60, 8, 150


@pytest.fixture(scope="module")
def stored(adapters: list[TunedWeights], tmp_path_factory: pytest.TempPathFactory) -> list[TunedWeights]:
    """Copies of three adapters: what each must say is known from those."""
    folder = tmp_path_factory.mktemp("stored")
    for number in range(STORED):
        shutil.copytree(adapters[number % 3].path, folder / str(number))
    return [
        adapters[number % 3].model_copy(update={"id": f"ft:{number}", "path": str(folder / str(number))})
        for number in range(STORED)
    ]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each folder has been read."""
    counts: Counter[str] = Counter()

    def read_and_count(folder: Path, **options):
        counts[folder.name] += 1
        return read_adapter(folder, **options)

    monkeypatch.setattr("worker.serving.adapters.read_adapter", read_and_count)
    return counts


def test_random_ones_of_many_adapters_are_answered_right_each_read_only_when_it_is_missing(
    make_engine, make_request, ask, adapters, stored, reads
):
    """The work of a request does not grow with what is stored: it costs one read at most."""
    largest = max(weights_size_bytes(Path(tuned.path)) for tuned in adapters)
    engine = make_engine(max_batch=4, adapter_bytes=RESIDENT * largest)
    expected = [ask(engine, make_request(tuned=tuned, max_tokens=8)).wait().text() for tuned in adapters]
    assert len(set(expected)) == 3
    reads.clear()
    choose = random.Random(3)
    asked = [choose.randrange(STORED) for _ in range(REQUESTS)]
    requests = [make_request(tuned=stored[number], max_tokens=8) for number in asked]
    listeners: list[Listener] = []
    for at, request in enumerate(requests):
        listeners.append(ask(engine, request))
        if at >= 12:  # so many wait or run at once
            listeners[at - 12].wait()
            assert engine.stats().adapters <= 3 * RESIDENT  # the smallest of the three are much smaller
            assert engine.stats().adapter_bytes <= RESIDENT * largest
    assert [each.wait().text() for each in listeners] == [expected[number % 3] for number in asked]
    assert len(set(asked)) <= sum(reads.values()) <= REQUESTS


def test_those_used_most_stay_while_many_pass_through(make_engine, make_request, ask, stored, reads):
    size = max(weights_size_bytes(Path(tuned.path)) for tuned in stored[:3])
    engine = make_engine(max_batch=2, adapter_bytes=4 * size)
    for number in range(1, 30):
        ask(engine, make_request(tuned=stored[0], max_tokens=2)).wait()
        ask(engine, make_request(tuned=stored[number], max_tokens=2)).wait()
    assert reads["0"] == 1
    assert all(count == 1 for count in reads.values())

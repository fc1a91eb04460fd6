"""One engine per name: loaded once, never waited for by those who ask for another."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.serving.listener import until
from tests.serving.test_trouble import break_decoding
from worker.serving.engine import Engine
from worker.serving.engines import Engines, StoppedError


class SlowDisk:
    """Loads the tiny model under any name; names that begin with `slow` wait for `may_load`."""

    def __init__(self, folder) -> None:
        self.folder = folder
        self.begun: list[str] = []
        self.may_load = threading.Event()

    def __call__(self, name: str) -> Engine:
        self.begun.append(name)
        if name.startswith("slow"):
            assert self.may_load.wait(20)
        return Engine(self.folder)


@pytest.fixture
def disk(tiny_dir):
    return SlowDisk(tiny_dir)


@pytest.fixture
def engines(disk):
    engines = Engines(disk)
    yield engines
    engines.stop()


def test_a_model_that_loads_keeps_nobody_from_the_others_and_loads_once(engines, disk):
    running = engines.open("quick")
    with ThreadPoolExecutor(2) as pool:
        slow = [pool.submit(engines.open, "slow") for _ in range(2)]
        until(lambda: "slow" in disk.begun)
        assert engines.open("quick") is running
        assert engines.open("another").alive
        assert not any(future.done() for future in slow)
        disk.may_load.set()
        assert slow[0].result(20) is slow[1].result(20)
    assert disk.begun.count("slow") == 1


def test_stopping_does_not_wait_for_a_model_that_loads_and_it_never_starts(engines, disk):
    running = engines.open("quick")
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(engines.open, "slow")
        until(lambda: "slow" in disk.begun)
        engines.stop()
        assert not running.alive
        assert not slow.done()
        disk.may_load.set()
        with pytest.raises(StoppedError):
            slow.result(20)
    assert engines.get("slow") is None
    with pytest.raises(StoppedError):
        engines.open("another")


def test_an_engine_that_died_is_named_and_one_that_was_stopped_is_not(engines, make_request, ask):
    engine = engines.open("quick")
    assert engines.dead(silent_s=60) == []
    break_decoding(engine)
    for _ in range(3):
        ask(engine, make_request()).wait()
    until(lambda: not engine.alive)
    assert engines.dead(silent_s=60) == ["quick"]
    assert engines.open("quick") is engine  # not replaced: the process has to end
    engines.stop()
    assert engines.dead(silent_s=60) == []

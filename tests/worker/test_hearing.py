"""Workers that lose the broker in all the ways there are: who asks hears the truth within ten seconds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from app.core.presence import describe, list_present
from app.core.redis_client import make_redis
from tests.proxy import Proxy, proxy_to
from worker import hearing
from worker.hearing import Ears

ROOT = Path(__file__).parents[2]
START = """
import worker.main
worker.main.LOST_S = 7.0
worker.main.run(__import__("app.core.settings").core.settings.get_settings(), worker.main.Queue.CONTROL)
"""
TRUTH_S = 10.0


@pytest.fixture
def broker(redis_url: str) -> Iterator[redis.Redis]:
    """What readiness reads."""
    with make_redis(redis_url) as client:
        client.flushall()
        yield client


@pytest.fixture
def line(redis_url: str) -> Iterator[tuple[Proxy, str]]:
    """How the worker reaches the broker."""
    with proxy_to(redis_url) as (proxy, url):
        yield proxy, url


@contextmanager
def control_worker(database_url: str, redis_url: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A real control worker."""
    own = {
        "LUTHIER_REDIS_URL": redis_url,
        "LUTHIER_DATABASE_URL": database_url,
        "LUTHIER_DATA_DIR": str(folder),
        "PYTHONPATH": str(ROOT),
    }
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", START], env={**os.environ, **own}, stdout=log, stderr=log, cwd="/"
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def seconds_until(condition: Callable[[], object], *, at_most_s: float) -> float:
    """How long it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < at_most_s, f"not within {at_most_s:g} s"
        time.sleep(0.05)
    return time.monotonic() - began


@pytest.fixture
def worker(
    database_url: str, line: tuple[Proxy, str], broker: redis.Redis, tmp_path: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """One that is present."""
    with control_worker(database_url, line[1], tmp_path) as process:
        seconds_until(lambda: describe(broker, kind="control") == "ok", at_most_s=60)
        time.sleep(hearing.CALL_EVERY_S)  # it has heard itself
        yield process


def test_a_worker_that_was_flushed_frozen_or_killed_is_soon_seen_as_it_is(
    worker: subprocess.Popen[bytes], broker: redis.Redis
) -> None:
    for _ in range(6):
        broker.flushall()
        time.sleep(0.5)
        assert not describe(broker, kind="control").startswith("deaf")
    seconds_until(lambda: describe(broker, kind="control") == "ok", at_most_s=5)
    worker.send_signal(signal.SIGSTOP)
    seconds_until(lambda: describe(broker, kind="control") == "no worker", at_most_s=TRUTH_S)
    worker.send_signal(signal.SIGCONT)
    seconds_until(lambda: describe(broker, kind="control") == "ok", at_most_s=TRUTH_S)
    worker.kill()
    seconds_until(lambda: describe(broker, kind="control") == "no worker", at_most_s=TRUTH_S)


def test_a_deaf_worker_says_so_and_ends_itself_for_another_to_start(
    worker: subprocess.Popen[bytes], broker: redis.Redis, line: tuple[Proxy, str]
) -> None:
    assert len(list_present(broker, kind="control")) == 1
    line[0].mute_after = b"BRPOP"  # whoever waits for messages gets none, though all else works
    seconds_until(lambda: describe(broker, kind="control") == "deaf: 1 of 1", at_most_s=TRUTH_S)
    assert list_present(broker, kind="control") == []
    assert worker.wait(30) == 69


def test_a_line_that_goes_half_open_or_a_broker_that_is_gone_for_long_ends_no_worker(
    worker: subprocess.Popen[bytes], broker: redis.Redis, line: tuple[Proxy, str]
) -> None:
    line[0].mute.set()
    seconds_until(lambda: describe(broker, kind="control") != "ok", at_most_s=TRUTH_S)
    time.sleep(3)
    line[0].mute.clear()
    seconds_until(lambda: describe(broker, kind="control") == "ok", at_most_s=15)
    line[0].refusing = True
    line[0].cut()
    seconds_until(lambda: describe(broker, kind="control") == "no worker", at_most_s=TRUTH_S)
    time.sleep(4)  # with what it took until here, longer than a deaf one may live
    assert worker.poll() is None
    line[0].refusing = False
    seconds_until(lambda: describe(broker, kind="control") == "ok", at_most_s=15)


def test_a_worker_whose_hands_are_full_is_not_deaf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hearing, "DEAF_S", 0.05)
    sent: list[int] = []
    ears = Ears(lambda: sent.append(1), slots=1)
    with ears.working():
        ears.call()
        time.sleep(0.1)
        assert not ears.deaf
    assert sent == []
    ears.call()
    time.sleep(0.1)
    assert ears.deaf  # sent, and nothing came
    with ears.working():
        assert not ears.deaf


def test_a_message_that_could_not_be_sent_makes_nobody_deaf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hearing, "DEAF_S", 0.05)

    def fail() -> None:
        raise ConnectionError

    ears = Ears(fail, slots=1)
    with pytest.raises(ConnectionError):
        ears.call()
    time.sleep(0.1)
    assert not ears.deaf

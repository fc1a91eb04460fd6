"""The guard over a lease, and threads that outlive their errors."""

from __future__ import annotations

import logging
import threading
import time

import pytest

from tests.worker.desk import wait_for
from worker.beat import Beat
from worker.lease import Lease


def test_the_guard_acts_once_when_nothing_was_renewed_in_time() -> None:
    acted: list[float] = []
    began = time.monotonic()
    with Lease(begun_at=began, safe_s=0.2, on_unsafe=lambda: acted.append(time.monotonic())) as lease:
        assert not lease.is_unsafe
        wait_for(lambda: acted)
        time.sleep(0.3)
        lease.renewed(at=time.monotonic())
        assert lease.is_unsafe  # what the guard ended stays ended
    assert len(acted) == 1
    assert acted[0] - began >= 0.2


def test_the_guard_leaves_a_renewed_lease_alone_and_ends_with_its_block() -> None:
    acted: list[int] = []
    with Lease(begun_at=time.monotonic(), safe_s=0.4, on_unsafe=lambda: acted.append(1)) as lease:
        for _ in range(8):
            time.sleep(0.1)
            lease.renewed(at=time.monotonic())
            assert not lease.is_unsafe
    time.sleep(0.6)
    assert acted == []
    assert "lease-guard" not in [thread.name for thread in threading.enumerate()]


def test_a_beat_goes_on_after_errors_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[int] = []

    def act() -> None:
        calls.append(1)
        if len(calls) < 5:
            raise ConnectionError

    beat = Beat("test", act, every_s=0.01)
    with caplog.at_level(logging.WARNING):
        beat.start()
        wait_for(lambda: len(calls) > 10)
        beat.stop()
    count = len(calls)
    time.sleep(0.05)
    assert len(calls) == count
    assert caplog.text.count("test failed, trying again") == 1

"""The guard over a lease, and threads that outlive their errors."""

from __future__ import annotations

import logging
import threading
import time

import pytest

from tests.worker.desk import wait_for
from worker.beat import Beat
from worker.lease import Lease


def test_a_lease_counts_from_the_beginning_of_its_last_renewal() -> None:
    now = time.monotonic()
    lease = Lease(begun_at=now - 100, safe_s=60, on_unsafe=lambda: None)
    assert lease.is_unsafe
    lease.renewed(at=now - 30)
    assert not lease.is_unsafe
    assert 30 <= lease.age_s < 60
    lease.renewed(at=now - 61)
    assert lease.is_unsafe


def test_the_guard_acts_once_when_nothing_was_renewed_in_time() -> None:
    acted: list[float] = []
    began = time.monotonic()
    with Lease(begun_at=began, safe_s=1.0, on_unsafe=lambda: acted.append(time.monotonic())) as lease:
        wait_for(lambda: acted)
        lease.renewed(at=time.monotonic())
        assert lease.is_unsafe  # what the guard ended stays ended
    assert len(acted) == 1
    assert acted[0] - began >= 1.0


def test_the_guard_leaves_a_renewed_lease_alone_and_ends_with_its_block() -> None:
    acted: list[int] = []
    began = time.monotonic()
    with Lease(begun_at=began, safe_s=2.0, on_unsafe=lambda: acted.append(1)) as lease:
        lease.renewed(at=began + 600)  # generous, so that no pause of this machine can undo it
        wait_for(lambda: time.monotonic() > began + 2.2)  # past the moment the guard was set to
        assert not lease.is_unsafe
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
        beat.join(timeout_s=20)
    assert "test" not in [thread.name for thread in threading.enumerate()]
    assert caplog.text.count("test failed, trying again") == 1


def test_stopping_a_beat_does_not_wait_for_the_call_in_progress_and_no_other_begins() -> None:
    inside, may_go, calls = threading.Event(), threading.Event(), []

    def act() -> None:
        calls.append(1)
        inside.set()
        may_go.wait(20)

    beat = Beat("slow", act, every_s=0.01)
    beat.stop()
    beat.join(timeout_s=0)  # never started: nothing to wait for
    beat = Beat("slow", act, every_s=0.01)
    beat.start()
    assert inside.wait(20)
    began = time.monotonic()
    beat.stop()
    beat.join(timeout_s=0.01)
    assert time.monotonic() - began < 10
    may_go.set()
    beat.join(timeout_s=20)
    assert calls == [1]

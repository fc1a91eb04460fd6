"""A minute of the chaos harness in the ordinary tests: a killed worker, a wiped broker, a lost hint."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos import broker, processes  # noqa: F401 - each enters its faults
from tests.chaos.faults import ALL
from tests.chaos.run import try_faults
from tests.chaos.service import Service

SHORT = ("F02", "F16", "F21")


@pytest.fixture
def service(tmp_path: Path) -> Service:
    """A private service of this test alone."""
    tmp_path.chmod(0o711)
    return Service(tmp_path)


def test_a_killed_worker_a_wiped_broker_and_doubled_hints_cost_nothing_but_time(service: Service) -> None:
    try:
        service.start()
        results = try_faults(service, [ALL[name] for name in SHORT], seed=7, n=1, whole=False)
    finally:
        service.stop()
    assert [result.line(7) for result in results if not result.ok] == []
    assert sum(len(result.run.jobs) for result in results) > 50

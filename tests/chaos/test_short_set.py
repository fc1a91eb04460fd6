"""A minute of the chaos harness in the ordinary tests, and proof that its eyes are open."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import text

from tests.chaos import broker, processes, truth  # noqa: F401 - each enters its faults
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
        jobs = set().union(*(result.run.jobs for result in results))
        tamper(service, sorted(jobs)[0], sorted(jobs)[1])
        findings = truth.examine(service, (), jobs | {"ftjob-never-there"}, failed=set())
    finally:
        service.stop()
    assert [result.line(7) for result in results if not result.ok] == []
    assert len(jobs) > 50
    assert len(findings.lost) == 2
    assert len(findings.doubled) == 2  # it ended once and is queued; it ended twice


def tamper(service: Service, stalled: str, doubled: str) -> None:
    """What the harness must see: a job that stalls, and one that ended twice."""
    with service.engine.begin() as connection:
        connection.execute(
            text("UPDATE jobs SET status = 'queued', finished_at = NULL, priority = -100 WHERE id = :job"),
            {"job": stalled},
        )
        connection.execute(
            text(
                "INSERT INTO job_events (id, job_id, attempt, created_at, level, type, message, data)"
                " SELECT 'ftevent-again', job_id, attempt, created_at, level, type, message, data"
                " FROM job_events WHERE job_id = :job AND message = :words"
            ),
            {"job": doubled, "words": truth.COMPLETED},
        )

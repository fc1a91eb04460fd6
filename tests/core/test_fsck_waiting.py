"""`fsck` over jobs that wait: who has been told to the workers, and who is owed a word."""

from __future__ import annotations

from datetime import timedelta

from app.core import attempts
from app.core.attempts import Attempt
from app.core.db import utc_now
from app.core.tables import Job, JobEvent
from tests.core.installation import Installation

AGO = timedelta(minutes=10)


def test_a_job_that_waits_without_a_word_to_the_workers_is_named(installation: Installation) -> None:
    queued, read = installation.queued(), installation.house.job()
    installation.set(Job, hinted_at=utc_now() - AGO)
    assert {(f.subject, f.problem.partition(" without")[0]) for f in installation.findings()} == {
        (queued.id, "queued"),
        (read.id, "validating_files"),
    }
    installation.set(Job, not_before=utc_now() + AGO)
    assert installation.told() == []


def test_a_job_that_was_handed_back_this_moment_is_not_yet_owed_a_word(installation: Installation) -> None:
    job = installation.running()
    installation.set(Job, created_at=utc_now() - AGO)
    attempts.hand_back(installation.house.session, Attempt(job.id, job.attempt))
    installation.house.session.commit()
    assert installation.told() == []
    installation.set(JobEvent, created_at=utc_now() - AGO)
    assert [invariant for invariant, _ in installation.told()] == ["I4"]
    installation.set(Job, not_before=utc_now() - timedelta(seconds=1))  # it has rested until now
    assert installation.told() == []

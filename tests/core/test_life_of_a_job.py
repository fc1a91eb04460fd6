"""Thousands of interleavings of all that can happen to jobs, on real servers, held against a small model.

After every step each row is exactly what the model says; at the end of every life `fsck` finds nothing.
"""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import initialize, invariant, rule, run_state_machine_as_test
from sqlalchemy import Engine
from sqlalchemy.orm import Session, sessionmaker

from app.core import attempts
from app.core.attempts import Attempt
from app.core.db import transaction, utc_now
from app.core.errors import InvalidRequest
from app.core.fsck import survey
from app.core.fsck.finding import Severity, Site
from app.core.status import FINAL, JobStatus
from tests.core.installation import OWN_CHECKS
from tests.core.life import BASES, MAX_ATTEMPTS, NUMBERS, ModelJob, make_world
from tests.core.workers_at_work import ERROR, TRAINING, WorkersAtWork

LIVES, MOMENTS = 80, 50  # how many lives, and what happens in each
MOST_JOBS = 6
_S = JobStatus
which = st.integers(0, 10**6)  # picks one of however many there are


class LifeOfJobs(WorkersAtWork):
    """Users, workers and housekeeping, one short transaction after another."""

    counted: ClassVar[Counter[str]]

    @initialize()
    def begin(self) -> None:
        self.world.wipe()

    # One rule, not one for each act: of several, hypothesis leaves out about half in each life.
    @rule(choice=which, pick=which, way=which)
    def act(self, choice: int, pick: int, way: int) -> None:
        """Somebody does something that is possible now."""
        acts = self.possible()
        name = acts[choice % len(acts)]
        self.counted[name] += 1
        getattr(self, name)(pick, way)

    def possible(self) -> list[str]:
        """What can happen now, the telling more often than the vain."""
        idle, best = self.idle(), self.model.best(BASES)
        return [
            *["create"] * 2 * (len(self.model.jobs) < MOST_JOBS),
            *["ask", "ask", "keep_house", "keep_house", "let_time_pass"] * bool(self.model.jobs),
            *["claim", "hand_back_strays"] * bool(idle),
            *["claim", "claim", "claim_beside_another"] * (len(idle) > 1 and best is not None),
            *["train", "train", "train", "beat", "end", "end"] * bool(self.busy()),
            *["write_from_the_past"] * bool(self.zombies()),
        ]

    def create(self, pick: int, way: int) -> None:
        job = self.world.create(pick % 2, priority=way % 2, base_model=BASES[way % 5 == 0])
        self.model.jobs.append(job)
        if way % 3:
            self.validate(job, good=True)

    def ask(self, pick: int, way: int) -> None:
        """What users ask for; of a job in a final state in vain, but repeating is no error."""
        job = self.model.jobs[pick % len(self.model.jobs)]
        what = ("cancel", "pause", "pause", "resume", "resume", "resume")[way % 6]
        if job.status in FINAL and (what != "cancel" or job.status is not _S.CANCELLED):
            with pytest.raises(InvalidRequest):
                self.world.ask(job, what)
            return
        self.world.ask(job, what)
        if what == "cancel" and job.status is not _S.CANCELLED:
            job.go(_S.CANCELLED)
        elif what == "pause" and job.status is _S.QUEUED:
            job.go(_S.PAUSED)
        elif what == "pause" and job.status is not _S.PAUSED:
            job.pause_asked = True
        elif what == "resume":
            if job.status is _S.PAUSED:
                job.go(_S.QUEUED)
            job.pause_asked = False

    def keep_house(self, pick: int, way: int) -> None:
        """What the control worker does, and that it makes good for all messages being lost."""
        job = self.model.jobs[pick % len(self.model.jobs)]
        what = ("read", "read", "read badly", "sweep", "flush")[way % 5]
        if what.startswith("read"):
            self.validate(job, good=what == "read")
        elif what == "sweep":
            self.sweep()
        else:
            self.world.lose_messages()
            self.sweep()
            waiting = [job for job in self.model.jobs if job.may_be_claimed(BASES)]
            assert self.world.context.redis.llen(TRAINING) == len(waiting)

    def let_time_pass(self, pick: int, _way: int) -> None:
        """Past a lease nobody renews, or past the rest between two tries."""
        job = self.model.jobs[pick % len(self.model.jobs)]
        if job.status is _S.RUNNING:
            self.world.expire(job.id)
            job.expired = True
        elif job.rests:
            self.world.set(job.id, not_before=utc_now())
            job.rests = False

    def validate(self, job: ModelJob, *, good: bool) -> None:
        """Also of jobs long past it: a hint can be late, or come twice."""
        with transaction(self.world.sessions) as session:
            if good:
                done = attempts.finish_validation(session, job.id, hyperparameters=NUMBERS)
            else:
                done = attempts.fail_validation(session, job.id, error=ERROR)
        assert (done is not None) == (job.status is _S.VALIDATING_FILES)
        if done is not None and good:
            job.let_go()
        elif done is not None:
            job.go(_S.FAILED)

    def sweep(self) -> None:
        self.world.sweep()
        for job in self.model.jobs:
            if job.status is _S.RUNNING and job.expired:
                self.past.append(Attempt(job.id, job.attempt))
                job.die(MAX_ATTEMPTS)

    # What must be true

    @invariant()
    def rows_are_as_the_model_says(self) -> None:
        rows = self.world.rows()
        self.counted["moments"] += 1
        assert len(rows) == len(self.model.jobs)
        for job in self.model.jobs:
            row = rows[job.id]
            found = (row.status, row.attempt, row.deaths, row.pause_requested_at is not None)
            assert found == (job.status, job.attempt, job.deaths, job.pause_asked), row
            assert (row.lease_expires_at is not None) == (job.status is _S.RUNNING), row
            assert (row.finished_at is not None) == (job.status in FINAL), row
            if job.status not in FINAL:
                assert row.worker == job.worker, row
                rests = row.not_before is not None and row.not_before > utc_now()
                assert rests == job.rests, row

    def teardown(self) -> None:
        """Nothing that happened has left anything wrong."""
        self.counted["lives"] += 1
        self.counted.update(str(job.status) for job in self.model.jobs)
        self.counted["attempts"] += sum(job.attempt for job in self.model.jobs)
        self.world.tidy()
        context = self.world.context
        site = Site(self.world.sessions, context.storage, context.settings)
        found = survey.survey(site, settle_s=0, checks=OWN_CHECKS)
        assert [finding for finding in found if finding.severity is Severity.ERROR] == []


def test_whatever_happens_and_in_whatever_order_jobs_live_by_their_rules(
    sessions: sessionmaker[Session], redis_url: str, engine: Engine
) -> None:
    counted: Counter[str] = Counter()
    quickly = settings(
        max_examples=LIVES,
        stateful_step_count=MOMENTS,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    with make_world(sessions, redis_url=redis_url, engine=engine) as world:
        machine = type("Machine", (LifeOfJobs,), {"world": world, "counted": counted})
        run_state_machine_as_test(machine, settings=quickly)
    assert counted["moments"] >= LIVES * MOMENTS / 2, counted
    for status in JobStatus:
        assert counted[status] > 0, counted

"""What training workers do to jobs, rightly and wrongly, and what the model expects of each act."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from hypothesis.stateful import RuleBasedStateMachine
from sqlalchemy.orm import Session

from app.core import attempts
from app.core.attempts import Attempt, AttemptLost
from app.core.db import transaction
from app.core.failures import FailureCode, most_deaths
from app.core.status import JobStatus
from tests.core.life import BASES, MAX_ATTEMPTS, TOTAL_STEPS, Model, ModelJob, Worker, World
from worker import records
from worker.training.words import Log, Started

TRAINING = "training"
ERROR: dict[str, str | None] = {
    "code": FailureCode.NON_FINITE_LOSS,
    "message": "The loss is no number. Lower the learning rate.",
    "param": None,
}
_S = JobStatus


class WorkersAtWork(RuleBasedStateMachine):
    """Three workers, each of which may be wrong about what it holds."""

    world: ClassVar[World]
    counted: ClassVar[Counter[str]]  # what happened in all lives together

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.workers = [Worker(f"w{number}") for number in range(3)]
        self.past: list[Attempt] = []  # attempts that are over: what a zombie would write with

    def claim(self, pick: int, way: int) -> None:
        """A message leads to the best job, not to the one it names; its double leads to the next or none."""
        worker = self.idle()[pick % len(self.idle())]
        how = ("now", "now", "told", "told twice", "unheard")[way % 5]
        able = BASES if way % 4 else BASES[:1]
        if how.startswith("told") and self.world.context.redis.lpop(TRAINING) is None:
            return
        self.take(worker, able)
        if how == "told twice" and self.idle():
            self.take(self.idle()[0], able)
        if how == "unheard":  # the commit's answer is lost
            worker.attempt = None

    def claim_beside_another(self, _pick: int, way: int) -> None:
        """While a claim is not yet committed, and then perhaps never is."""
        first, second = self.idle()[:2]
        with self.world.sessions() as session:
            mine = attempts.claim_job(session, worker=first.name, lease_s=3600, base_models=BASES)
            best = self.model.best(BASES)
            assert (mine and mine.id) == (best and best.id)
            theirs = self.world.claim(second, BASES)
            rest = self.model.best(BASES, without=mine and mine.id)
            assert (theirs and theirs.id) == (rest and rest.id)
            if way % 2:
                session.commit()
            else:
                session.rollback()
        if theirs is not None:
            self.begin_attempt(second, theirs.id)
        if way % 2 and mine is not None:
            self.begin_attempt(first, mine.id)

    def train(self, pick: int, way: int) -> None:
        worker = self.busy()[pick % len(self.busy())]
        steps, saves, ends = way % TOTAL_STEPS + 1, way % 2, way % 5
        for step in range(worker.step + 1, min(worker.step + steps, TOTAL_STEPS) + 1):
            if self.own(worker, lambda attempt, step=step: self.world.train(attempt, step)) is None:
                return
            worker.step = step
        if (saves or worker.step == TOTAL_STEPS) and worker.saved < worker.step and not self.save(worker):
            return
        if ends and worker.saved == TOTAL_STEPS:
            job = self.own(worker, self.world.finish)
            if job is not None:
                job.go(_S.SUCCEEDED)
                self.over(worker)

    def beat(self, pick: int, _way: int) -> None:
        """Renew the lease, and look for a pause."""
        worker = self.busy()[pick % len(self.busy())]
        asked: list[bool] = []

        def act(session: Session, attempt: Attempt) -> None:
            attempts.renew_lease(session, attempt, lease_s=3600)
            asked.append(attempts.wants_pause(session, attempt))

        job = self.write(worker, act)
        if job is not None:
            job.expired = False
            assert asked == [job.pause_asked]

    def end(self, pick: int, way: int) -> None:
        worker = self.busy()[pick % len(self.busy())]
        how = ("hand back", "fail", "die", "die", "die of memory", "crash", "crash")[way % 7]
        job: ModelJob | None = None
        if how == "hand back":  # a pause reached, or a worker told to stop
            job = self.write(worker, attempts.hand_back)
            if job is not None:
                job.let_go()
        elif how == "fail":
            job = self.write(worker, lambda session, attempt: attempts.fail(session, attempt, error=ERROR))
            if job is not None:
                job.go(_S.FAILED)
        elif how == "crash":  # nobody is told; another worker with another name stands in its place
            self.past += [worker.attempt] if worker.attempt else []
            self.workers[self.workers.index(worker)] = Worker(f"{worker.name}'")
        else:
            code = FailureCode.TRAINER_DIED if how == "die" else FailureCode.HOST_OUT_OF_MEMORY
            job = self.own(worker, lambda attempt: self.world.die(attempt, code))
            if job is not None:
                job.die(min(MAX_ATTEMPTS, most_deaths(code)))
        if job is not None:
            self.over(worker)

    def hand_back_strays(self, pick: int, _way: int) -> None:
        """Jobs claimed for an idle worker that it never heard of."""
        worker = self.idle()[pick % len(self.idle())]
        strays = [job for job in self.model.jobs if job.worker == worker.name and job.status is _S.RUNNING]
        with transaction(self.world.sessions) as session:
            assert attempts.hand_back_strays(session, worker=worker.name) == len(strays)
        for job in strays:
            self.past.append(Attempt(job.id, job.attempt))
            job.let_go()

    def write_from_the_past(self, pick: int, way: int) -> None:
        """An attempt that is over writes nothing, whatever it tries."""
        attempt = self.zombies()[pick % len(self.zombies())]
        before = self.world.rows(), self.world.count_events()
        writes = self.zombie_writes(attempt)
        with pytest.raises(AttemptLost):
            writes[way % len(writes)]()
        assert (self.world.rows(), self.world.count_events()) == before
        self.world.let_go(attempt)
        self.counted["zombies"] += 1

    # How the model is asked

    def idle(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.attempt is None]

    def busy(self) -> list[Worker]:
        """Who believes to be; the job may be another's by now."""
        return [worker for worker in self.workers if worker.attempt is not None]

    def zombies(self) -> list[Attempt]:
        """Attempts that are over. One that crashed unseen is not, as long as its job's row is its own."""
        return [attempt for attempt in self.past if self.model.owned(attempt) is None]

    def take(self, worker: Worker, able: tuple[str, ...]) -> bool:
        """Claim, and see that it is the job the model says."""
        row, best = self.world.claim(worker, able), self.model.best(able)
        assert (row and row.id) == (best and best.id)
        if row is not None:
            self.begin_attempt(worker, row.id)
        return row is not None

    def begin_attempt(self, worker: Worker, job_id: str) -> None:
        job = self.model.get(job_id)
        job.go(_S.RUNNING)
        job.attempt += 1
        job.worker = worker.name
        worker.attempt = Attempt(job_id, job.attempt)
        # Every second attempt finds no checkpoint whole and trains again what was trained before.
        worker.step = worker.saved = job.furthest if job.attempt % 2 else 0

    def save(self, worker: Worker) -> bool:
        """Publish and record a checkpoint of where it is; False when the attempt is lost."""
        step = worker.step
        job = self.own(worker, lambda attempt: self.world.save(attempt, step))
        if job is None:
            return False
        worker.saved = step
        if step > job.furthest:
            job.furthest, job.deaths = step, 0
        return True

    def own(self, worker: Worker, act: Callable[[Attempt], object]) -> ModelJob | None:
        """Let a worker write; None when it has learned by this that it holds the job no more."""
        attempt = worker.attempt
        assert attempt is not None
        job = self.model.owned(attempt)
        if job is not None:
            act(attempt)
            return job
        with pytest.raises(AttemptLost):
            act(attempt)
        self.over(worker)
        self.counted["lost"] += 1
        return None

    def write(self, worker: Worker, act: Callable[[Session, Attempt], object]) -> ModelJob | None:
        """As `own`, in a transaction."""

        def transact(attempt: Attempt) -> None:
            with transaction(self.world.sessions) as session:
                act(session, attempt)

        return self.own(worker, transact)

    def over(self, worker: Worker) -> None:
        assert worker.attempt is not None
        self.world.let_go(worker.attempt)
        self.past.append(worker.attempt)
        worker.attempt = None

    def zombie_writes(self, attempt: Attempt) -> list[Callable[[], object]]:
        """All that an attempt can write."""

        def transact(act: Callable[..., object], **options: Any) -> Callable[[], object]:
            def run() -> None:
                with transaction(self.world.sessions) as session:
                    act(session, attempt, **options)

            return run

        world = self.world
        return [
            transact(attempts.renew_lease, lease_s=3600),
            transact(attempts.wants_pause),
            transact(attempts.hand_back),
            transact(attempts.fail, error=ERROR),
            transact(records.record_log, word=Log(message="I am the past"), event_id="fe-past"),
            transact(records.record_start, word=Started(step=1), event_id="fe-past"),
            lambda: world.train(attempt, 1),
            lambda: world.save(attempt, 1),
            lambda: world.finish(attempt),
            lambda: world.die(attempt, FailureCode.TRAINER_DIED),
        ]

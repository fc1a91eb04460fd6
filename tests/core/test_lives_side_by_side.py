"""Users, workers and housekeeping all at once, in threads: no deadlock, no double, and all jobs can end.

Which transactions meet is left to chance; what may come of it is not.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

from sqlalchemy import Engine, select
from sqlalchemy.orm import Session, sessionmaker

from app.core import attempts
from app.core.attempts import Attempt, AttemptLost
from app.core.db import transaction
from app.core.errors import InvalidRequest
from app.core.failures import FailureCode
from app.core.fsck import survey
from app.core.fsck.finding import Site
from app.core.status import FINAL, JobStatus
from app.core.tables import Checkpoint, Job
from tests.core.installation import OWN_CHECKS
from tests.core.life import BASES, NUMBERS, TOTAL_STEPS, ModelJob, Worker, World, make_world

WORKERS, TURNS = 4, 60
_S = JobStatus


class Bustle:
    """What the threads share."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.jobs: list[ModelJob] = []
        self.claims: list[tuple[str, int]] = []
        self.counted: Counter[str] = Counter()

    def use(self, chance: random.Random) -> None:
        """A turn of a user, and the reading of files that follows."""
        if len(self.jobs) < 12 or chance.random() < 0.2:
            job = self.world.create(chance.randrange(2), priority=chance.randrange(2), base_model=BASES[0])
            self.jobs.append(job)
            with transaction(self.world.sessions) as session:
                attempts.finish_validation(session, job.id, hyperparameters=NUMBERS)
        else:
            what = chance.choice(("pause", "resume", "resume", "cancel"))
            self.world.ask(chance.choice(self.jobs), what)

    def keep_house(self, chance: random.Random) -> None:
        running = [job_id for job_id, status in self.states() if status is _S.RUNNING]
        if running and chance.random() < 0.5:
            self.world.expire(chance.choice(running))
        self.world.rest_no_more()
        self.world.sweep()
        self.world.tidy()

    def work(self, chance: random.Random) -> None:
        """One attempt of a worker, from its claim to whatever end."""
        worker = Worker(f"w{chance.random()}")
        job = self.world.claim(worker, BASES)
        if job is None:
            return
        self.claims.append((job.id, job.attempt))
        attempt = Attempt(job.id, job.attempt)
        try:
            self.train(attempt, chance.choice(("finish", "finish", "die", "hand back", "vanish")))
        finally:
            self.world.let_go(attempt)

    def train(self, attempt: Attempt, end: str) -> None:
        with self.world.sessions() as session:
            query = select(Checkpoint.step_number).where(Checkpoint.job_id == attempt.job_id)
            done = max(session.scalars(query), default=0)
        last = TOTAL_STEPS if end == "finish" else TOTAL_STEPS - 1
        for step in range(done + 1, last + 1):
            self.world.train(attempt, step)
            self.world.save(attempt, step)
        if end == "finish":
            self.world.finish(attempt)
        elif end == "die":
            self.world.die(attempt, FailureCode.TRAINER_DIED)
        elif end == "hand back":
            with transaction(self.world.sessions) as session:
                attempts.hand_back(session, attempt)
        self.counted[end] += 1

    def states(self) -> list[tuple[str, JobStatus]]:
        with self.world.sessions() as session:
            return [(row[0], row[1]) for row in session.execute(select(Job.id, Job.status))]

    def turns(self, act: Callable[[random.Random], None], seed: int) -> None:
        """Many turns of one thread; being refused is part of life, anything else is not."""
        chance = random.Random(seed)
        for _ in range(TURNS):
            try:
                act(chance)
            except (AttemptLost, InvalidRequest) as refused:
                self.counted[type(refused).__name__] += 1

    def end_all(self) -> None:
        """Nothing is stuck: what the users let go on comes to its end, one attempt each."""
        for job in self.jobs:
            if dict(self.states())[job.id] not in FINAL:
                self.world.ask(job, "resume")
                self.world.expire(job.id)
        self.world.sweep()
        self.world.rest_no_more()
        worker = Worker("last")
        while (job := self.world.claim(worker, BASES)) is not None:
            attempt = Attempt(job.id, job.attempt)
            self.claims.append((job.id, job.attempt))
            self.train(attempt, "finish")
            self.world.let_go(attempt)


def test_all_at_once_nothing_is_doubled_stuck_or_wrong(
    sessions: sessionmaker[Session], redis_url: str, engine: Engine
) -> None:
    with make_world(sessions, redis_url=redis_url, engine=engine) as world:
        bustle = Bustle(world)
        acts = [bustle.use, bustle.use, bustle.keep_house, *[bustle.work] * WORKERS]
        with ThreadPoolExecutor(len(acts)) as threads:
            running = [threads.submit(bustle.turns, act, seed) for seed, act in enumerate(acts)]
            for done in wait(running).done:
                done.result()
        bustle.end_all()
        assert {status for _, status in bustle.states()} <= FINAL
        assert len(bustle.claims) == len(set(bustle.claims))
        assert bustle.counted["finish"] > 10, bustle.counted
        assert bustle.counted["AttemptLost"] > 0, bustle.counted
        world.tidy()
        site = Site(sessions, world.context.storage, world.context.settings)
        assert survey.survey(site, settle_s=0, checks=OWN_CHECKS) == []

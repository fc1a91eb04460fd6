"""The life of jobs as it should be, in plain Python, and the real world it is held against.

`Model` knows the rules and no SQL; `World` does the same things to PostgreSQL, Valkey and storage through
the functions the service uses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sqlalchemy import Connection, Engine, Row, delete, func, select, update
from sqlalchemy.orm import Session, sessionmaker

from app.core import attempts, files, jobs
from app.core.attempts import Attempt, Death
from app.core.base_models import BaseModelEntry, Catalogue
from app.core.db import transaction, utc_now
from app.core.failures import FailureCode
from app.core.files import NewFile
from app.core.housekeeping import purge, sweep, tidy
from app.core.jobs import NewJob
from app.core.keys import Caller
from app.core.settings import Settings
from app.core.status import FINAL, JobStatus, may_become
from app.core.tables import Checkpoint, File, Job, JobEvent, TunedModel
from app.core.vocabulary import Purpose
from tests.core.installation import fill
from tests.core.rows import EXAMPLE, make_caller
from worker import records
from worker.context import Context, make_context
from worker.training.words import CheckpointReady, Finished, Metrics, StepDone

TOTAL_STEPS = 3
MAX_ATTEMPTS = 3
BASES = ("tiny", "large")
NUMBERS = {"n_epochs": 1, "batch_size": 1, "learning_rate_multiplier": 1.0}
_ENTRY = BaseModelEntry(name="tiny", source="file:///nowhere/tiny", context_length=512, licence="MIT")
_S = JobStatus


@dataclass
class ModelJob:
    """What must be true of a job now."""

    id: str
    project: int
    priority: int
    base_model: str
    status: JobStatus = _S.VALIDATING_FILES
    attempt: int = 0
    deaths: int = 0
    worker: str | None = None
    expired: bool = False  # the lease of a running job has run out
    rests: bool = False  # not_before lies ahead
    pause_asked: bool = False
    furthest: int = 0  # highest step with a checkpoint

    def go(self, status: JobStatus) -> None:
        """Move to another state, which has to be one of the allowed moves."""
        assert may_become(self.status, status), f"{self.status} -> {status}"
        self.status = status
        if status in FINAL:
            self.pause_asked = self.rests = False
        if status is not _S.RUNNING:
            self.expired = False
        if status in (_S.QUEUED, _S.PAUSED):
            self.worker = None

    def let_go(self) -> None:
        """Its attempt or its validation ends without an end of the job."""
        self.go(_S.PAUSED if self.pause_asked else _S.QUEUED)
        self.pause_asked = False

    def die(self, most: int) -> None:
        """Its attempt ends by the machine's fault."""
        self.deaths += 1
        if self.deaths >= most:
            self.go(_S.FAILED)
        else:
            self.let_go()
            self.rests = True

    def may_be_claimed(self, able: tuple[str, ...]) -> bool:
        """Whether a worker with these weights may take it."""
        return self.status is _S.QUEUED and not self.rests and self.base_model in able


@dataclass
class Model:
    """All jobs, oldest first."""

    jobs: list[ModelJob] = field(default_factory=list)

    def best(self, able: tuple[str, ...], *, without: str | None = None) -> ModelJob | None:
        """The job a free worker has to take: by priority, then by fairness, then by age."""
        running = [job.project for job in self.jobs if job.status is _S.RUNNING]
        waiting = [job for job in self.jobs if job.may_be_claimed(able) and job.id != without]
        return min(waiting, key=lambda job: (-job.priority, running.count(job.project)), default=None)

    def owned(self, attempt: Attempt) -> ModelJob | None:
        """The job of an attempt that may still write; None for one of the past."""
        job = self.get(attempt.job_id)
        return job if job.status is _S.RUNNING and job.attempt == attempt.number else None

    def get(self, job_id: str) -> ModelJob:
        return next(job for job in self.jobs if job.id == job_id)


@dataclass
class Worker:
    """What a worker believes of itself; it may be wrong."""

    name: str
    attempt: Attempt | None = None
    step: int = 0  # steps it has trained
    saved: int = 0  # step of its newest checkpoint


@dataclass(frozen=True)
class World:
    """The real thing."""

    context: Context
    reader: Connection  # in no transaction, so that looking after each step costs one round trip
    callers: tuple[Caller, ...]
    files: tuple[str, ...]

    @property
    def sessions(self) -> sessionmaker[Session]:
        return self.context.sessions

    def wipe(self) -> None:
        """Back to two projects with one file each."""
        with transaction(self.sessions) as session:
            for table in (JobEvent, Checkpoint, TunedModel, Job):
                session.execute(delete(table))
            session.execute(delete(File).where(File.purpose == Purpose.FINE_TUNE_RESULTS))
        for place in ("weights", "attempts", "files"):
            for path in (self.context.storage.root / place).iterdir():
                if path.name not in self.files:
                    self.context.storage.delete(f"{place}/{path.name}")
        self.context.redis.flushall()

    def create(self, project: int, *, priority: int, base_model: str) -> ModelJob:
        caller, file = self.callers[project], self.files[project]
        new = NewJob(model=base_model, training_file=file, luthier={"priority": priority})
        context = self.context
        with transaction(self.sessions) as session:
            job = jobs.create_job(session, context.sender, context.catalogue, caller=caller, new=new)
        self.settle()
        return ModelJob(job.id, project, priority, base_model)

    def ask(self, job: ModelJob, what: str) -> None:
        """What a user can ask of a job."""
        names = {"project_id": self.callers[job.project].project_id, "job_id": job.id}
        with transaction(self.sessions) as session:
            if what == "cancel":
                jobs.cancel_job(session, **names)
            elif what == "pause":
                jobs.pause_job(session, **names)
            else:
                jobs.resume_job(session, self.context.sender, **names)
        self.settle()

    def lose_messages(self) -> None:
        """And wait so long that all of them count as lost."""
        self.context.redis.flushall()
        with transaction(self.sessions) as session:
            session.execute(update(Job).values(hinted_at=None))

    def claim(self, worker: Worker, able: tuple[str, ...]) -> Job | None:
        with transaction(self.sessions) as session:
            return attempts.claim_job(session, worker=worker.name, lease_s=3600, base_models=able)

    def sweep(self) -> None:
        context = self.context
        with transaction(self.sessions) as session:
            assert sweep(session, context.storage, context.sender, context.settings) is not None
        self.settle()

    def tidy(self) -> None:
        """What housekeeping does less often."""
        context = self.context
        with transaction(self.sessions) as session:
            purge(session, context.storage, context.settings)
        with transaction(self.sessions) as session:
            tidy(session, context.storage, context.settings)

    def settle(self) -> None:
        """Wait until all hints have left."""
        assert self.context.sender.flush(timeout_s=5)

    def set(self, job_id: str, **values: Any) -> None:
        """Let time pass for a row: the database's clock cannot be moved."""
        with transaction(self.sessions) as session:
            session.execute(update(Job).where(Job.id == job_id).values(**values))

    def expire(self, job_id: str) -> None:
        """Let a lease run out; where none is held any more, nothing."""
        with transaction(self.sessions) as session:
            held = update(Job).where(Job.id == job_id, Job.status == _S.RUNNING)
            session.execute(held.values(lease_expires_at=func.clock_timestamp()))

    def rest_no_more(self) -> None:
        """Let the pauses between tries pass."""
        with transaction(self.sessions) as session:
            session.execute(update(Job).where(Job.not_before.is_not(None)).values(not_before=utc_now()))

    def rows(self) -> dict[str, Row[Any]]:
        return {job.id: job for job in self.reader.execute(select(*Job.__table__.columns))}

    def count_events(self) -> int:
        return self.reader.scalar(select(func.count()).select_from(JobEvent)) or 0

    def train(self, attempt: Attempt, step: int) -> None:
        """A step, as the trainer tells it."""
        word = StepDone(
            metrics=Metrics(step=step, train_loss=1.0),
            total_steps=TOTAL_STEPS,
            epoch=1,
            learning_rate=1e-4,
            tokens=8,
            elapsed_s=1.0,
            tokens_per_second=8.0,
        )
        with transaction(self.sessions) as session:
            records.record_step(session, attempt, word)

    def save(self, attempt: Attempt, step: int) -> None:
        """A checkpoint, published and then recorded, as the worker does it."""
        folder = records.attempt_folder(self.context, attempt.job_id, attempt.number) / f"step-{step}"
        if not folder.exists():
            fill(folder)
        word = CheckpointReady(metrics=Metrics(step=step, train_loss=1.0), dir=str(folder))
        records.publish_checkpoint(self.context, attempt, word)
        try:
            with transaction(self.sessions) as session:
                records.record_checkpoint(self.context, session, attempt, word)
        except attempts.AttemptLost:
            with transaction(self.sessions) as session:
                key = records.checkpoint_key(attempt, word)
                records.drop_unnamed_checkpoint(self.context, session, key)
            raise

    def finish(self, attempt: Attempt) -> None:
        word = Finished(trained_tokens=24, steps=TOTAL_STEPS, step=TOTAL_STEPS)
        with transaction(self.sessions) as session:
            records.record_success(self.context, session, attempt, word)

    def die(self, attempt: Attempt, code: FailureCode) -> None:
        death = Death("The trainer was killed by SIGKILL.", code)
        with transaction(self.sessions) as session:
            attempts.requeue(session, attempt, death=death, max_attempts=MAX_ATTEMPTS, pause_s=3600)

    def let_go(self, attempt: Attempt) -> None:
        """The worker is done with an attempt, whatever became of it."""
        records.drop_attempt_folder(self.context, attempt)


@contextmanager
def make_world(sessions: sessionmaker[Session], *, redis_url: str, engine: Engine) -> Iterator[World]:
    """Two projects with a file each, storage in memory where the machine has such a place."""
    memory = Path("/dev/shm")
    with (
        TemporaryDirectory(dir=memory if memory.is_dir() else None) as root,
        engine.connect().execution_options(isolation_level="AUTOCOMMIT") as reader,
    ):
        context = _context(sessions, redis_url, Path(root))
        with sessions() as session:
            callers = tuple(make_caller(session, name) for name in ("one", "two"))
        yield World(context, reader, callers, tuple(_upload(context, caller) for caller in callers))


def _context(sessions: sessionmaker[Session], redis_url: str, root: Path) -> Context:
    asked = {"max_attempts": MAX_ATTEMPTS, "retry_pause_s": 3600, "redis_url": redis_url, "data_dir": root}
    settings = Settings(database_url="postgresql+psycopg://", **asked)
    # So short that attempts have renewed after the tests' server began.
    context = make_context(settings.model_copy(update={"lease_s": 0.1}))
    entries = {name: _ENTRY.model_copy(update={"name": name}) for name in BASES}
    return dataclasses.replace(context, sessions=sessions, catalogue=Catalogue(entries))


def _upload(context: Context, caller: Caller) -> str:
    pending = context.storage.begin()
    pending.write(EXAMPLE * 10)
    new = NewFile("a.jsonl", Purpose.FINE_TUNE)
    with transaction(context.sessions) as session:
        return files.create_file(
            session, context.storage, project_id=caller.project_id, new=new, pending=pending
        ).id

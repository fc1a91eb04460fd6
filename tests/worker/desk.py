"""Acts for a user and looks at what the workers left, so that tests read as stories."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select

from app.core import events, files, jobs
from app.core.db import transaction
from app.core.files import NewFile
from app.core.jobs import NewJob
from app.core.keys import Caller
from app.core.pages import Cursor
from app.core.tables import Checkpoint, File, Job, JobEvent, TunedModel
from app.core.vocabulary import EventType, Purpose
from worker import control
from worker.context import Context
from worker.trainer import Trainer


def examples(count: int) -> bytes:
    """A good training file."""
    lines = []
    for number in range(count):
        question = {"role": "user", "content": f"Where is my order {number}?"}
        lines.append(json.dumps({"messages": [question, {"role": "assistant", "content": "Here."}]}))
    return ("\n".join(lines) + "\n").encode()


def wait_for(condition: Callable[[], object], *, timeout_s: float = 60.0) -> None:
    """Return once the condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


@dataclass(frozen=True)
class Desk:
    """One user, one worker's context."""

    context: Context
    caller: Caller

    def upload(self, data: bytes) -> str:
        pending = self.context.storage.begin()
        pending.write(data)
        with transaction(self.context.sessions) as session:
            new = NewFile("a.jsonl", Purpose.FINE_TUNE)
            return files.create_file(
                session, self.context.storage, project_id=self.caller.project_id, new=new, pending=pending
            ).id

    def create(self, data: bytes | None = None, **new: Any) -> str:
        """A job whose files nobody has read yet."""
        new = {"model": "tiny", "luthier": {"adapter": "lora", "rank": 2}, "seed": 1} | new
        asked = NewJob(training_file=self.upload(examples(10) if data is None else data), **new)
        context = self.context
        with transaction(context.sessions) as session:
            return jobs.create_job(
                session, context.sender, context.catalogue, caller=self.caller, new=asked
            ).id

    def queue(self, *, n_epochs: int = 1, batch_size: int = 5, **new: Any) -> str:
        """A job that waits for a trainer."""
        numbers = {"n_epochs": n_epochs, "batch_size": batch_size, "learning_rate_multiplier": 1.0}
        job_id = self.create(hyperparameters=numbers, **new)
        control.validate_job(self.context, job_id)
        return job_id

    def job(self, job_id: str) -> Job:
        with self.context.sessions() as session:
            return jobs.get_job(session, project_id=self.caller.project_id, job_id=job_id)

    def cancel(self, job_id: str) -> None:
        with transaction(self.context.sessions) as session:
            jobs.cancel_job(session, project_id=self.caller.project_id, job_id=job_id)

    def pause(self, job_id: str) -> None:
        with transaction(self.context.sessions) as session:
            jobs.pause_job(session, project_id=self.caller.project_id, job_id=job_id)

    def resume(self, job_id: str) -> None:
        context = self.context
        with transaction(context.sessions) as session:
            jobs.resume_job(session, context.sender, project_id=self.caller.project_id, job_id=job_id)

    def events(self, job_id: str) -> list[JobEvent]:
        """Oldest first."""
        with self.context.sessions() as session:
            page = events.list_events(session, job_id=job_id, cursor=Cursor(limit=5000))
        return list(reversed(page.data))

    def words(self, job_id: str) -> list[str]:
        """What events say, without those of single steps."""
        return [event.message for event in self.events(job_id) if event.type is EventType.MESSAGE]

    def steps(self, job_id: str) -> list[int]:
        return [event.step or 0 for event in self.events(job_id) if event.type is EventType.METRICS]

    def checkpoints(self, job_id: str) -> list[Checkpoint]:
        """Kept ones, newest first."""
        with self.context.sessions() as session:
            return list(events.list_checkpoints(session, job_id=job_id, cursor=Cursor()).data)

    def models(self) -> list[TunedModel]:
        with self.context.sessions() as session:
            return list(session.scalars(select(TunedModel).order_by(TunedModel.created_at)))

    def model(self, name: str) -> TunedModel:
        with self.context.sessions() as session:
            return session.get_one(TunedModel, name)

    def file(self, file_id: str) -> File:
        with self.context.sessions() as session:
            return session.get_one(File, file_id)

    def leftovers(self) -> list[str]:
        """Names in the places of work in progress."""
        root = self.context.storage.root
        return [path.name for place in ("tmp", "attempts") for path in (root / place).iterdir()]

    def with_settings(self, **changes: Any) -> Desk:
        settings = self.context.settings.model_copy(update=changes)
        return dataclasses.replace(self, context=dataclasses.replace(self.context, settings=settings))


def child_of(trainer: Trainer) -> int:
    assert trainer._process is not None
    return trainer._process.pid


def warm(trainer: Trainer) -> None:
    trainer.start()
    assert trainer.wait_ready(timeout_s=120)


def running(desk: Desk, job_id: str, *, steps: int = 2) -> Callable[[], bool]:
    return lambda: len(desk.steps(job_id)) >= steps

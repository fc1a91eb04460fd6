"""A job that is only asked about: the question to a control worker, and its answer, by way of the broker.

Nothing is written down. Who asks has checked names and rights; the control worker reads the files.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import redis
from pydantic import BaseModel, ConfigDict

from app.core.ids import random_name
from app.core.queue import Queue, Sender, Task
from app.core.tables import Job

_GLANCE_S = 1.0  # within the patience of the client's socket
_KEPT_S = 60  # an answer nobody has fetched


class Question(BaseModel):
    """What of a job decides about its numbers and its estimate."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    project_id: str
    model: str
    base_model: str
    training_file: str
    validation_file: str | None
    method: str
    hyperparameters: dict[str, Any]
    luthier: dict[str, Any]
    seed: int
    reply_to: str
    expires_at: float  # unix seconds; past it nobody waits for the answer

    @classmethod
    def about(cls, job: Job, *, wait_s: float) -> Question:
        """The question about a job that is in no table."""
        names = cls.model_fields.keys() - {"reply_to", "expires_at"}
        fields = {name: getattr(job, name) for name in names}
        reply_to = f"luthier:assessment:{random_name(24)}"
        return cls(**fields, reply_to=reply_to, expires_at=time.time() + wait_s)

    def job(self) -> Job:
        """The job asked about."""
        return Job(id="dry-run", **self.model_dump(exclude={"reply_to", "expires_at"}))


class Answer(BaseModel):
    """The job's numbers and what it will take; or the error it would fail with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hyperparameters: dict[str, Any] | None = None
    estimate: dict[str, Any] | None = None
    error: dict[str, str | None] | None = None


def ask(client: redis.Redis, sender: Sender, question: Question) -> Answer | None:
    """Send the question and wait for its answer; None when none came in time."""
    sender.send(Task.ASSESS_JOB, str(Queue.CONTROL), question.model_dump())
    while time.time() < question.expires_at:
        with suppress(redis.TimeoutError):
            found = client.blpop([question.reply_to], timeout=_GLANCE_S)
            if found is not None:
                return Answer.model_validate_json(found[1])
    return None


def answer(client: redis.Redis, question: Question, found: Answer) -> None:
    """Leave the answer for who asked."""
    pipe = client.pipeline(transaction=True)
    pipe.rpush(question.reply_to, found.model_dump_json())
    pipe.expire(question.reply_to, _KEPT_S)
    pipe.execute()

"""Rows for tests of core: a project, its files and jobs, made through the functions users reach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from app.core import files, jobs, keys, served_models
from app.core.base_models import BaseModelEntry, Catalogue
from app.core.files import NewFile
from app.core.jobs import NewJob
from app.core.keys import Caller
from app.core.queue import Sender, make_celery
from app.core.settings import Settings
from app.core.storage import Storage
from app.core.tables import File, Job, TunedModel
from app.core.vocabulary import Purpose

ENTRY = BaseModelEntry(name="tiny", source="file:///nowhere/tiny", context_length=512, licence="MIT")
CATALOGUE = Catalogue({"tiny": ENTRY})
EXAMPLE = b'{"messages":[{"role":"user","content":"hi"},{"role":"assistant","content":"hello"}]}\n'


@dataclass(frozen=True)
class House:
    """One project and what is needed to act in it."""

    session: Session
    storage: Storage
    sender: Sender
    caller: Caller

    def file(self, data: bytes = EXAMPLE * 10, *, purpose: Purpose = Purpose.FINE_TUNE, **new: Any) -> File:
        pending = self.storage.begin()
        pending.write(data)
        row = files.create_file(
            self.session,
            self.storage,
            project_id=self.caller.project_id,
            new=NewFile("a.jsonl", purpose, **new),
            pending=pending,
        )
        self.session.commit()
        return row

    def job(self, file: File | None = None, **new: Any) -> Job:
        """A job that waits for its files to be read."""
        asked = {"model": "tiny", "training_file": (file or self.file()).id} | new
        job = jobs.create_job(self.session, self.sender, CATALOGUE, caller=self.caller, new=NewJob(**asked))
        self.session.commit()
        assert self.sender.flush(timeout_s=20)
        return job

    def ended_job(self) -> Job:
        """A job nobody works on any more; what it made is its owner's to delete."""
        job = self.job()
        jobs.cancel_job(self.session, project_id=job.project_id, job_id=job.id)
        self.session.commit()
        return job

    def model(self, job: Job, *, uid: str = "abc", key: str = "weights/one", **kind: bool) -> TunedModel:
        """A tuned model with bytes in storage."""
        folder = self.storage.path(key)
        folder.mkdir(exist_ok=True)
        (folder / "adapter.safetensors").write_bytes(b"x")
        name = f"ft:tiny:acme::{uid}"
        row = served_models.add_model(
            self.session, job, name=name, storage_key=key, is_checkpoint=kind.get("is_checkpoint", False)
        )
        self.session.commit()
        return row


def make_caller(session: Session, project: str) -> Caller:
    row = keys.ensure_project(session, project=project, organization="acme")
    _, secret = keys.create_key(session, project=row, name="test")
    caller = keys.authenticate(session, secret)
    session.commit()
    return caller


def make_sender(redis_url: str) -> Sender:
    return Sender(make_celery(Settings(redis_url=redis_url)))


def pick(mapping: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: mapping[name] for name in names}

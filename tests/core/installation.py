"""A small installation with a past, for tests that break exactly one thing in it."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session, sessionmaker

from app.core import attempts, events, files, served_models
from app.core.attempts import Attempt
from app.core.db import transaction
from app.core.files import NewFile
from app.core.fsck import processes, survey
from app.core.fsck.finding import Finding, Severity, Site
from app.core.ids import Prefix, new_id
from app.core.manifest import TRAINING_STATE, write_manifest
from app.core.settings import Settings
from app.core.tables import Checkpoint, Job, TunedModel
from app.core.vocabulary import Purpose
from tests.core.rows import House

STEPS = 4
NUMBERS = {"n_epochs": 1, "batch_size": 1, "learning_rate_multiplier": 1.0}
# Those of the machine would see the trainers of other tests.
OWN_CHECKS = tuple(check for check in survey.CHECKS if check is not processes.check_trainers)


@dataclass(frozen=True)
class Installation:
    """What happened in it, and what `fsck` says of it."""

    house: House
    site: Site

    def queued(self, **new: Any) -> Job:
        job = self.house.job(**new)
        attempts.finish_validation(self.house.session, job.id, hyperparameters=NUMBERS)
        self.house.session.commit()
        return job

    def running(self, *, steps: int = 0) -> Job:
        """A job in its first attempt, `steps` steps into it, a checkpoint at every second."""
        self.queued()
        session = self.house.session
        job = attempts.claim_job(session, worker="w1", lease_s=30)
        assert job is not None
        events.add_message(session, job, "Fine-tuning job started")
        for step in range(1, steps + 1):
            data = {"step": step, "total_steps": STEPS, "train_loss": 1.0}
            events.add_metrics(session, job, message=f"Step {step}/{STEPS}", step=step, data=data)
            if step % 2 == 0:
                self.checkpoint(job, step)
        session.commit()
        return job

    def checkpoint(self, job: Job, step: int) -> TunedModel:
        """A whole and resumable one."""
        session, key = self.house.session, f"weights/{job.id}-{job.attempt}-{step}"
        fill(self.house.storage.path(key))
        name = f"{job.id}:ckpt-step-{step}"
        model = served_models.add_model(session, job, name=name, storage_key=key, is_checkpoint=True)
        session.add(
            Checkpoint(
                id=new_id(Prefix.CHECKPOINT),
                job_id=job.id,
                model_id=name,
                step_number=step,
                metrics={},
                resumable=True,
            )
        )
        session.flush()
        events.add_message(session, job, f"Checkpoint created at step {step} with Snapshot ID: {name}")
        return model

    def succeeded(self) -> Job:
        """A job that ran to its end, settled by housekeeping."""
        job, session = self.running(steps=STEPS), self.house.session
        pending = self.house.storage.begin()
        pending.write(b"step,train_loss\n")
        results = files.create_file(
            session,
            self.house.storage,
            project_id=job.project_id,
            new=NewFile("step_metrics.csv", Purpose.FINE_TUNE_RESULTS),
            pending=pending,
        )
        key = f"weights/{job.id}-1-{STEPS}"
        model = served_models.add_model(
            session, job, name=f"ft:tiny:{job.id}", storage_key=key, is_checkpoint=False
        )
        values = {"fine_tuned_model": model.id, "trained_tokens": 512, "result_file": results.id}
        attempts.succeed(session, Attempt(job.id, job.attempt), values=values)
        events.add_message(session, job, f"New fine-tuned model created: {model.id}")
        events.add_message(session, job, "The job has successfully completed")
        session.execute(update(Checkpoint).values(resumable=False))
        session.commit()
        for folder in (self.house.storage.root / "weights").iterdir():
            drop_state(folder)
        return job

    def set(self, table: type[Any], row_id: str | None = None, **values: Any) -> None:
        """Break a row, or all of a table."""
        change = update(table).values(**values)
        self.house.session.execute(change if row_id is None else change.where(table.id == row_id))
        self.house.session.commit()

    def weights(self, job: Job, step: int = STEPS) -> Path:
        return self.house.storage.path(f"weights/{job.id}-1-{step}")

    def findings(self, *, strict: bool = False) -> list[Finding]:
        found = survey.survey(self.site, settle_s=0, checks=OWN_CHECKS)
        return [f for f in found if strict or f.severity is Severity.ERROR]

    def told(self, *, strict: bool = False) -> list[tuple[str, str]]:
        """Invariant and problem of all that is wrong."""
        return [(finding.invariant, finding.problem) for finding in self.findings(strict=strict)]

    def mend(self) -> int:
        """Do all repairs; how many changed something."""
        findings = [finding for finding in self.findings(strict=True) if finding.repair is not None]
        return sum(survey.mend(self.site, finding) for finding in findings)


def make_installation(house: House, sessions: sessionmaker[Session]) -> Installation:
    return Installation(house, Site(sessions, house.storage, Settings()))


def fill(folder: Path, *, state: bool = True) -> None:
    """An adapter of one tensor as the trainer leaves it, with its training state and manifest."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text('{"r": 2}')
    tensor = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "lora_A": tensor}).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(24))
    if state:
        (folder / TRAINING_STATE).mkdir()
        (folder / TRAINING_STATE / "position.json").write_text('{"step": 2}')
    write_manifest(folder, step=2)


def drop_state(folder: Path) -> None:
    state = folder / TRAINING_STATE
    for path in state.iterdir() if state.is_dir() else ():
        path.unlink()
    if state.is_dir():
        state.rmdir()


def model_of(installation: Installation, job: Job) -> TunedModel:
    """The model of a job that succeeded."""
    with transaction(installation.site.sessions) as session:
        query = select(TunedModel).where(TunedModel.job_id == job.id, TunedModel.is_checkpoint.is_(False))
        return session.scalars(query).one()

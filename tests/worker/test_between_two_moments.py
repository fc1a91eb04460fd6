"""What changes between two looks of a worker: its disk goes, a pause is withdrawn, a checkpoint is needed."""

from __future__ import annotations

import threading

import pytest
from sqlalchemy.orm import Session

from app.core import jobs
from app.core.attempts import Attempt
from app.core.db import transaction
from app.core.jobs import NewJob
from app.core.status import JobStatus
from app.core.tables import Job
from tests.core.installation import fill
from tests.worker.desk import Desk, running, wait_for, warm
from tests.worker.test_runner import at_work
from worker import control, records
from worker.runner import Runner
from worker.trainer import Trainer
from worker.training.words import CheckpointReady, Metrics


def test_a_disk_that_is_away_fails_no_job_and_keeps_the_worker_from_taking_one(
    desk: Desk, trainer: Trainer
) -> None:
    warm(trainer)
    waits, unread = desk.queue(), desk.create()
    runner = Runner(desk.context, trainer)
    folder = desk.context.storage.root / "files"
    away = folder.rename(folder.with_name("away"))
    with pytest.raises(OSError, match="not there"):
        control.validate_job(desk.context, unread)
    runner.run_waiting()
    assert runner.device is None
    assert desk.job(unread).status is JobStatus.VALIDATING_FILES
    assert (desk.job(waits).status, desk.job(waits).attempt) == (JobStatus.QUEUED, 0)
    away.rename(folder)
    assert runner.device is not None
    runner.run_waiting()
    assert desk.job(waits).status is JobStatus.SUCCEEDED


def test_a_disk_that_goes_after_the_claim_costs_a_try_and_says_so(
    desk: Desk, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = desk.with_settings(max_attempts=1)
    job_id = desk.queue()
    folder = desk.context.storage.root / "files"
    folder.rename(folder.with_name("away"))
    monkeypatch.setattr(Runner, "_may_begin", lambda _self: True)  # it was there a moment ago
    Runner(desk.context, trainer).run_waiting()
    error = desk.job(job_id).error
    assert error is not None
    assert error["code"] == "server_error"
    assert "The worker could not reach its storage." in (error["message"] or "")


def test_a_pause_withdrawn_while_the_trainer_stops_is_told_as_that(
    desk: Desk, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm(trainer)
    ask = trainer.ask_to_stop

    def withdraw() -> None:
        desk.resume(job_id)
        ask()

    monkeypatch.setattr(trainer, "ask_to_stop", withdraw)
    job_id = desk.queue(n_epochs=20, batch_size=1)
    with at_work(Runner(desk.context, trainer)) as thread:
        wait_for(running(desk, job_id))
        desk.pause(job_id)
        wait_for(lambda: not thread.is_alive())
    job = desk.job(job_id)
    assert (job.status, job.attempt, job.deaths) == (JobStatus.SUCCEEDED, 2, 0)
    assert "A pause was withdrawn too late to go on; the job is queued again" in desk.words(job_id)


def test_a_checkpoint_stays_when_a_job_on_it_is_created_at_this_moment(desk: Desk) -> None:
    job_id = desk.queue()
    with transaction(desk.context.sessions) as session:
        job = session.get_one(Job, job_id)
        job.status, job.attempt = JobStatus.RUNNING, 1
    attempt = Attempt(job_id, 1)
    for step in (1, 2, 3):
        _record(desk, attempt, step)
    oldest = desk.checkpoints(job_id)[-1].model_id
    file_id = desk.upload(b"")
    with transaction(desk.context.sessions) as session:
        _create_on(desk, session, model=oldest, file_id=file_id)
        recording = threading.Thread(target=_record, args=(desk, attempt, 4))
        recording.start()
        recording.join(timeout=0.5)  # one that waits for the row has looked at the jobs already
    recording.join()
    assert desk.model(oldest).deleted_at is None
    assert len(desk.checkpoints(job_id)) == 4


def _record(desk: Desk, attempt: Attempt, step: int) -> None:
    folder = records.attempt_folder(desk.context, attempt.job_id, attempt.number) / f"step-{step}"
    fill(folder)
    word = CheckpointReady(metrics=Metrics(step=step, train_loss=1.0), dir=str(folder))
    records.publish_checkpoint(desk.context, attempt, word)
    with transaction(desk.context.sessions) as session:
        records.record_checkpoint(desk.context, session, attempt, word)


def _create_on(desk: Desk, session: Session, *, model: str, file_id: str) -> None:
    context = desk.context
    new = NewJob(model=model, training_file=file_id)
    jobs.create_job(session, context.sender, context.catalogue, caller=desk.caller, new=new)

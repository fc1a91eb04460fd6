"""Whole attempts on a tiny model with the real child process: their ends, good and bad."""

from __future__ import annotations

import csv
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from app.core.attempts import Attempt
from app.core.db import transaction
from app.core.status import JobStatus
from app.core.tables import Job
from app.core.vocabulary import EventType
from tests.worker.desk import Desk, child_of, examples, running, wait_for, warm
from worker import control, records
from worker.records import RESULT_COLUMNS
from worker.runner import Runner
from worker.trainer import Trainer, TrainerDiedError
from worker.training.words import CheckpointReady, Log, Metrics, Started


@contextmanager
def at_work(runner: Runner) -> Iterator[threading.Thread]:
    """The runner works in its own thread, as a Celery task would."""
    thread = threading.Thread(target=runner.run_waiting)
    thread.start()
    try:
        yield thread
    finally:
        runner.stopping.set()
        thread.join(timeout=60)
        assert not thread.is_alive()


def test_a_job_runs_from_queued_to_a_model_that_answers(desk: Desk, trainer: Trainer) -> None:
    validation = desk.upload(examples(3))
    job_id = desk.queue(n_epochs=5, batch_size=5, validation_file=validation, suffix="shop")
    Runner(desk.context, trainer).run_waiting()
    job = desk.job(job_id)
    assert (job.status, job.error, job.attempt, job.deaths) == (JobStatus.SUCCEEDED, None, 1, 0)
    assert job.trained_tokens is not None
    assert job.trained_tokens > 0
    assert job.trained_tokens % 5 == 0
    assert job.finished_at is not None
    assert job.started_at is not None
    assert job.estimated_finish is None
    assert re.fullmatch(r"ft:tiny:acme:shop:\w{8}", job.fine_tuned_model or "")

    kept = desk.checkpoints(job_id)
    assert [checkpoint.step_number for checkpoint in kept] == [10, 8, 6]
    words = desk.words(job_id)
    assert words[:4] == [
        f"Created fine-tuning job: {job_id}",
        f"Validating training file: {job.training_file} and validation file: {validation}",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
    ]
    made = [word for word in words if word.startswith("Checkpoint created at step ")]
    assert [int(word.split()[4]) for word in made] == [2, 4, 6, 8, 10]
    assert words[-2:] == [
        f"New fine-tuned model created: {job.fine_tuned_model}",
        "The job has successfully completed",
    ]
    metrics = [event for event in desk.events(job_id) if event.type is EventType.METRICS]
    assert [event.step for event in metrics] == list(range(1, 11))
    assert re.fullmatch(r"Step 1/10: training loss=\d+\.\d\d.*", metrics[0].message)
    assert "full validation loss=" in metrics[1].message
    assert metrics[9].data["total_steps"] == 10

    folders = {model.id: desk.context.storage.path(model.storage_key) for model in desk.models()}
    assert (folders[job.fine_tuned_model or ""] / "adapter_model.safetensors").is_file()
    for checkpoint in kept:
        assert (folders[checkpoint.model_id] / "adapter_config.json").is_file()
        assert checkpoint.metrics["train_loss"] > 0
    assert desk.leftovers() == []

    results = desk.file(job.result_file or "")
    rows = list(csv.DictReader(desk.context.storage.path(results.storage_key).read_text().splitlines()))
    assert list(rows[0]) == list(RESULT_COLUMNS)
    assert [int(row["step"]) for row in rows] == list(range(1, 11))
    assert all(float(row["train_loss"]) > 0 for row in rows)


def test_the_estimated_finish_comes_closer_to_the_end(desk: Desk, trainer: Trainer) -> None:
    warm(trainer)
    job_id = desk.queue(n_epochs=30, batch_size=2)
    guesses = []
    with at_work(Runner(desk.context, trainer)) as thread:

        def look() -> bool:
            job = desk.job(job_id)
            if job.estimated_finish is not None:
                guesses.append(job.estimated_finish)
            return job.status is JobStatus.SUCCEEDED

        wait_for(look, timeout_s=120)
        wait_for(lambda: not thread.is_alive())
    end = desk.job(job_id).finished_at
    assert end is not None
    assert abs((guesses[-1] - end).total_seconds()) < 1.0


def test_jobs_that_wait_are_run_one_after_another_by_one_child(desk: Desk, trainer: Trainer) -> None:
    ids = [desk.queue() for _ in range(3)]
    warm(trainer)
    child = child_of(trainer)
    Runner(desk.context, trainer).run_waiting()
    assert [desk.job(job_id).status for job_id in ids] == [JobStatus.SUCCEEDED] * 3
    assert child_of(trainer) == child


def test_a_cancel_stops_the_child_within_a_moment(desk: Desk, trainer: Trainer) -> None:
    warm(trainer)
    child = child_of(trainer)
    job_id = desk.queue(n_epochs=50, batch_size=1)
    with at_work(Runner(desk.context, trainer)) as thread:
        wait_for(running(desk, job_id))
        desk.cancel(job_id)
        seen = len(desk.events(job_id))
        wait_for(lambda: not thread.is_alive(), timeout_s=10)
    assert desk.job(job_id).status is JobStatus.CANCELLED
    assert len(desk.events(job_id)) == seen
    with pytest.raises(ProcessLookupError):
        os.killpg(child, 0)
    assert desk.leftovers() == []
    assert desk.job(job_id).fine_tuned_model is None


def test_a_job_whose_child_is_shot_is_tried_again_and_succeeds(desk: Desk, trainer: Trainer) -> None:
    warm(trainer)
    job_id = desk.queue(n_epochs=4, batch_size=1)
    with at_work(Runner(desk.context, trainer)):
        wait_for(running(desk, job_id, steps=15))
        os.kill(child_of(trainer), signal.SIGKILL)
        wait_for(lambda: desk.job(job_id).status is JobStatus.SUCCEEDED, timeout_s=60)
    job = desk.job(job_id)
    assert (job.attempt, job.deaths) == (2, 0)  # it made progress after the death
    assert desk.steps(job_id) == list(range(1, 41))
    words = desk.words(job_id)
    assert any("killed by SIGKILL" in word and "queued again (try 2 of 3)" in word for word in words)
    assert words.count("Fine-tuning job started") == 1
    assert "Fine-tuning job resumed after step 10 (attempt 2)" in words
    made = [int(word.split()[4]) for word in words if word.startswith("Checkpoint created")]
    assert made == [10, 20, 30, 40]
    keys = [model.storage_key for model in desk.models() if model.deleted_at is None]
    assert all(desk.context.storage.path(key).is_dir() for key in keys)
    assert desk.leftovers() == []


def test_a_job_whose_every_attempt_dies_fails_with_the_reason(desk: Desk, trainer: Trainer) -> None:
    warm(trainer)
    desk = desk.with_settings(max_attempts=2)
    job_id = desk.queue(n_epochs=50, batch_size=1)
    with at_work(Runner(desk.context, trainer)) as thread:
        for attempt in (1, 2):
            wait_for(lambda number=attempt: desk.job(job_id).attempt == number)
            wait_for(lambda: trainer.is_ready, timeout_s=60)
            os.kill(child_of(trainer), signal.SIGSEGV)
            wait_for(lambda number=attempt: desk.job(job_id).deaths == number)
        wait_for(lambda: not thread.is_alive())
    job = desk.job(job_id)
    assert job.status is JobStatus.FAILED
    assert job.error == {
        "code": "trainer_died",
        "message": "The job failed after 2 attempts without progress. The trainer was killed by SIGSEGV. "
        "Tell the operator: the worker's log says more.",
        "param": None,
    }


def test_a_file_that_is_gone_at_the_start_fails_the_job(desk: Desk, trainer: Trainer) -> None:
    job_id = desk.queue()
    desk.context.storage.delete(desk.file(desk.job(job_id).training_file).storage_key)
    Runner(desk.context, trainer).run_waiting()
    job = desk.job(job_id)
    assert job.status is JobStatus.FAILED
    assert job.error is not None
    assert (job.error["code"], job.error["param"]) == ("file_not_found", "training_file")
    assert desk.words(job_id)[-1] == job.error["message"]


def test_a_job_whose_weights_are_not_here_waits_for_a_worker_that_has_them(
    desk: Desk, trainer: Trainer
) -> None:
    job_id = desk.queue(model="gone")
    Runner(desk.context, trainer).run_waiting()
    job = desk.job(job_id)
    assert (job.status, job.attempt) == (JobStatus.QUEUED, 0)


def test_a_worker_that_is_stopped_saves_and_hands_its_job_back_without_a_lost_try(
    desk: Desk, trainer: Trainer
) -> None:
    warm(trainer)
    job_id = desk.queue(n_epochs=50, batch_size=1)
    with at_work(Runner(desk.context, trainer)):
        wait_for(running(desk, job_id, steps=3))
    job = desk.job(job_id)
    assert (job.status, job.deaths, job.attempt, job.worker) == (JobStatus.QUEUED, 0, 1, None)
    assert desk.words(job_id)[-1] == "The worker was stopped; the job is queued again"
    saved = desk.checkpoints(job_id)[0].step_number
    assert saved == max(desk.steps(job_id))
    assert trainer.is_ready
    assert desk.leftovers() == []

    with at_work(Runner(desk.context, trainer)):
        wait_for(running(desk, job_id, steps=saved + 3))
    assert f"Fine-tuning job resumed after step {saved} (attempt 2)" in desk.words(job_id)
    assert desk.steps(job_id) == list(range(1, len(desk.steps(job_id)) + 1))


def test_a_pause_saves_a_model_that_answers_and_frees_the_trainer(desk: Desk, trainer: Trainer) -> None:
    warm(trainer)
    child = child_of(trainer)
    job_id = desk.queue(n_epochs=30, batch_size=1)
    other = desk.create()
    with at_work(Runner(desk.context, trainer)) as thread:
        wait_for(running(desk, job_id, steps=3))
        desk.pause(job_id)
        wait_for(lambda: desk.job(job_id).status is JobStatus.PAUSED)
        wait_for(lambda: not thread.is_alive())
    job = desk.job(job_id)
    assert (job.deaths, job.lease_expires_at, job.finished_at) == (0, None, None)
    newest = desk.checkpoints(job_id)[0]
    assert newest.step_number == max(desk.steps(job_id))
    folder = desk.context.storage.path(desk.model(newest.model_id).storage_key)
    assert (folder / "adapter_model.safetensors").is_file()
    assert child_of(trainer) == child
    control.validate_job(desk.context, other)
    Runner(desk.context, trainer).run_waiting()  # the device is free for somebody else
    assert desk.job(other).status is JobStatus.SUCCEEDED
    assert desk.job(job_id).status is JobStatus.PAUSED

    desk.resume(job_id)
    Runner(desk.context, trainer).run_waiting()
    assert desk.job(job_id).status is JobStatus.SUCCEEDED
    assert desk.steps(job_id) == list(range(1, 301))
    assert f"Fine-tuning job resumed after step {newest.step_number} (attempt 2)" in desk.words(job_id)


def test_a_step_that_hangs_is_ended_and_its_section_named(desk: Desk, trainer: Trainer) -> None:
    warm(trainer)
    desk = desk.with_settings(step_limit_s=1.0, max_attempts=1)
    job_id = desk.queue(n_epochs=50, batch_size=1)
    with at_work(Runner(desk.context, trainer)) as thread:
        wait_for(running(desk, job_id))
        child = child_of(trainer)
        os.kill(child, signal.SIGSTOP)
        wait_for(lambda: not thread.is_alive(), timeout_s=20)
    error = desk.job(job_id).error
    assert error is not None
    assert error["code"] == "trainer_stalled"
    assert re.search(
        r"made no progress for 1 s while training \(section step, step \d+\)", error["message"] or ""
    )
    with pytest.raises(ProcessLookupError):
        os.killpg(child, 0)


def test_a_job_goes_on_from_a_tuned_model(desk: Desk, trainer: Trainer) -> None:
    first = desk.queue()
    Runner(desk.context, trainer).run_waiting()
    name = desk.job(first).fine_tuned_model
    assert name is not None
    second = desk.queue(model=name, luthier={})
    Runner(desk.context, trainer).run_waiting()
    job = desk.job(second)
    assert (job.status, job.error) == (JobStatus.SUCCEEDED, None)
    assert (job.model, job.base_model, job.luthier["rank"]) == (name, "tiny", 2)


def test_keep_warm_does_not_replace_a_child_that_died_at_work(desk: Desk, trainer: Trainer) -> None:
    warm(trainer)
    job_id = desk.queue(n_epochs=20, batch_size=1)
    runner = Runner(desk.context, trainer)
    over = threading.Event()

    def beat() -> None:
        while not over.wait(0.001):
            runner.keep_warm()

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        with at_work(runner):
            wait_for(running(desk, job_id))
            os.kill(child_of(trainer), signal.SIGKILL)
            wait_for(lambda: desk.job(job_id).deaths == 1, timeout_s=10)
    finally:
        over.set()
        beating.join()
    assert any("killed by SIGKILL" in word for word in desk.words(job_id))


def test_a_commit_whose_answer_was_lost_does_not_lose_the_checkpoint(desk: Desk, trainer: Trainer) -> None:
    """The write is repeated; the second time its own row stands there already."""
    job_id = desk.queue()
    with transaction(desk.context.sessions) as session:
        job = session.get_one(Job, job_id)
        job.status, job.attempt = JobStatus.RUNNING, 1
    folder = desk.context.storage.root / "attempts" / "made"
    folder.mkdir()
    (folder / "adapter.safetensors").write_bytes(b"x")
    word = CheckpointReady(metrics=Metrics(step=1, train_loss=1.0), dir=str(folder))
    attempt = Attempt(job_id, 1)
    for _ in range(2):
        records.publish_checkpoint(desk.context, attempt, word)
        with transaction(desk.context.sessions) as session:
            records.record_checkpoint(desk.context, session, attempt, word)
    key = records.checkpoint_key(attempt, word)
    with transaction(desk.context.sessions) as session:  # and then the job is cancelled
        records.drop_unnamed_checkpoint(desk.context, session, key)
    assert (desk.context.storage.path(key) / "adapter.safetensors").is_file()
    assert len(desk.checkpoints(job_id)) == 1


def test_a_commit_whose_answer_was_lost_says_nothing_twice(desk: Desk) -> None:
    job_id = desk.queue()
    with transaction(desk.context.sessions) as session:
        job = session.get_one(Job, job_id)
        job.status, job.attempt = JobStatus.RUNNING, 2
    before = len(desk.words(job_id))
    attempt = Attempt(job_id, 2)
    for _ in range(2):
        with transaction(desk.context.sessions) as session:
            records.record_start(session, attempt, Started(step=4), event_id="ftevent-start")
            records.record_log(session, attempt, Log(message="The device is small"), event_id="ftevent-log")
    said = ["Fine-tuning job resumed after step 4 (attempt 2)", "The device is small"]
    assert desk.words(job_id)[before:] == said


def test_no_job_is_taken_while_something_of_the_last_one_cannot_be_ended(
    desk: Desk, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start() -> None:
        raise TrainerDiedError("Processes of an earlier training run hold the device.")

    job_id = desk.queue()
    with monkeypatch.context() as patched:
        patched.setattr(trainer, "start", start)
        Runner(desk.context, trainer).run_waiting()
        assert (desk.job(job_id).status, desk.job(job_id).attempt) == (JobStatus.QUEUED, 0)
    Runner(desk.context, trainer).run_waiting()
    assert desk.job(job_id).status is JobStatus.SUCCEEDED

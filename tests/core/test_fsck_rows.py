"""`fsck` over rows: each test breaks one thing in a sound installation and sees exactly that named."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import delete, update

from app.core import attempts, events, jobs
from app.core.attempts import Attempt
from app.core.db import utc_now
from app.core.fsck import survey
from app.core.status import JobStatus
from app.core.tables import Checkpoint, File, IdempotencyKey, Job, JobEvent, TunedModel
from app.core.vocabulary import EventType
from tests.core.installation import STEPS, Installation, model_of
from tests.core.rows import make_caller

AGO = timedelta(minutes=10)
ERROR = {"code": "worker_lost", "message": "The worker w1 is gone. Try again.", "param": None}


def message(installation: Installation, job: Job, text: str, **values: Any) -> None:
    events.add_message(installation.house.session, job, text)
    last = installation.house.session.query(JobEvent).order_by(JobEvent.sequence.desc()).first()
    assert last is not None
    if values:
        installation.set(JobEvent, last.id, **values)
    installation.house.session.commit()


def forget(installation: Installation, *conditions: Any) -> None:
    installation.house.session.execute(delete(JobEvent).where(*conditions))
    installation.house.session.commit()


def fail(installation: Installation, **error: Any) -> Job:
    job = installation.running()
    attempts.fail(installation.house.session, Attempt(job.id, 1), error=ERROR | error)
    installation.house.session.commit()
    return job


def test_an_installation_with_a_past_is_clean_even_to_strict_eyes(installation: Installation) -> None:
    installation.succeeded()
    fail(installation)
    installation.house.ended_job()
    paused = installation.queued()
    jobs.pause_job(installation.house.session, project_id=paused.project_id, job_id=paused.id)
    installation.house.session.commit()
    assert installation.told(strict=True) == []


def test_an_installation_at_work_is_clean_but_for_what_is_in_flight(installation: Installation) -> None:
    installation.running(steps=3)
    installation.queued()
    installation.house.job()
    (installation.house.storage.root / "tmp" / "upload").write_bytes(b"half")
    assert installation.told() == []
    assert {invariant for invariant, _ in installation.told(strict=True)} == {"I4", "I10"}


@pytest.mark.parametrize(
    ("values", "invariant", "problem"),
    [
        ({"finished_at": None}, "I2", "succeeded, but finished_at is missing"),
        ({"error": ERROR}, "I2", "succeeded, but its error is set"),
        ({"lease_expires_at": utc_now()}, "I2", "succeeded, but it holds a lease"),
        ({"pause_requested_at": utc_now()}, "I2", "succeeded, but a pause is asked for"),
        ({"trained_tokens": None}, "I9", "succeeded with trained_tokens None"),
        ({"fine_tuned_model": "ft:other"}, "I5", "succeeded, but its model ft:other has no row"),
        ({"result_file": None}, "I5", "succeeded, but its results file has no row"),
        ({"training_file": "file-gone"}, "I1", "its training_file file-gone has no row"),
        ({"validation_file": "file-gone"}, "I1", "its validation_file file-gone has no row"),
    ],
)
def test_a_column_that_does_not_fit_a_succeeded_job_is_named(
    installation: Installation, values: dict[str, Any], invariant: str, problem: str
) -> None:
    job = installation.succeeded()
    installation.set(Job, job.id, **values)
    assert installation.told() == [(invariant, problem)]
    assert [finding.subject for finding in installation.findings()] == [job.id]


@pytest.mark.parametrize("column", ["lease_expires_at", "pause_requested_at"])
def test_what_an_ended_job_still_holds_is_let_go(installation: Installation, column: str) -> None:
    job = installation.succeeded()
    installation.set(Job, job.id, **{column: utc_now()})
    assert installation.mend() == 1
    assert installation.told(strict=True) == []
    assert installation.mend() == 0


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"finished_at": utc_now()}, "running, but finished_at is set"),
        ({"worker": None}, "running, but no attempt holds it"),
        ({"lease_expires_at": None}, "running, but no attempt holds it"),
        ({"fine_tuned_model": "ft:early"}, "running, but it names a model or a results file"),
    ],
)
def test_a_column_that_does_not_fit_a_running_job_is_named(
    installation: Installation, values: dict[str, Any], problem: str
) -> None:
    job = installation.running()
    installation.set(Job, job.id, **values)
    assert installation.told() == [("I2", problem)]


def test_a_lease_that_ran_out_unnoticed_is_named(installation: Installation) -> None:
    job = installation.running()
    installation.set(Job, job.id, lease_expires_at=utc_now() - timedelta(seconds=2))
    assert installation.told() == []  # housekeeping will have it in a moment
    assert any("its lease ran out" in problem for _, problem in installation.told(strict=True))
    installation.set(Job, job.id, lease_expires_at=utc_now() - AGO)
    [(invariant, problem)] = installation.told()
    assert invariant == "I4"
    assert re.fullmatch(r"its lease ran out 6\d\d s ago and nobody has queued it again", problem)


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        ({"code": "oops"}, "failed with 'oops', which is no code of the list"),
        ({"code": None}, "failed with 'None', which is no code of the list"),
        ({"message": "Error"}, "failed without a sentence that says why"),
        ({"message": "Traceback (most recent call last):\n x y"}, "failed without a sentence that says why"),
    ],
)
def test_a_failure_that_does_not_explain_itself_is_named(
    installation: Installation, error: dict[str, Any], problem: str
) -> None:
    job = fail(installation)
    installation.set(Job, job.id, error=ERROR | error)
    assert installation.told() == [("I12", problem)]


def test_a_failed_job_without_its_error_is_named(installation: Installation) -> None:
    job = fail(installation)
    installation.set(Job, job.id, error=None)
    assert installation.told() == [("I2", "failed, but its error is missing")]


def test_an_event_of_an_older_attempt_after_a_newer_one_began_is_named(installation: Installation) -> None:
    job = installation.running()
    installation.set(Job, job.id, attempt=2)
    installation.house.session.refresh(job)
    message(installation, job, "Fine-tuning job started")
    assert installation.told() == []
    message(installation, job, "I am the past", attempt=1)
    assert installation.told() == [("I3", "attempt 1 wrote an event after attempt 2 had begun")]


def test_an_event_of_an_attempt_that_never_was_is_named(installation: Installation) -> None:
    job = installation.running()
    message(installation, job, "I am the future", attempt=7)
    assert installation.told() == [("I3", "an event of attempt 7, which never was")]


def test_a_gap_in_the_metrics_is_named(installation: Installation) -> None:
    installation.succeeded()
    forget(installation, JobEvent.type == EventType.METRICS, JobEvent.step == 2)
    assert installation.told() == [("I6", f"metrics of 3 steps from 1 to {STEPS}")]


def test_metrics_that_end_before_the_last_step_are_named(installation: Installation) -> None:
    installation.succeeded()
    forget(installation, JobEvent.type == EventType.METRICS, JobEvent.step == STEPS)
    assert installation.told() == [("I6", f"succeeded with metrics up to step {STEPS - 1} only")]
    forget(installation, JobEvent.type == EventType.METRICS)
    assert installation.told() == [("I6", "succeeded with metrics up to step 0 only")]


def test_metrics_of_two_different_runs_are_named(installation: Installation) -> None:
    installation.running(steps=2)
    installation.house.session.execute(
        update(JobEvent).where(JobEvent.step == 1).values(data={"step": 1, "total_steps": 99})
    )
    installation.house.session.commit()
    assert installation.told() == [("I6", "its metrics name different numbers of steps")]


@pytest.mark.parametrize(
    "words",
    ["Files validated, moving job to queued state", "Checkpoint created at step 2 with Snapshot ID: other"],
)
def test_what_happens_once_but_is_told_twice_is_named(installation: Installation, words: str) -> None:
    job = installation.running(steps=2)
    message(installation, job, words)
    said = words.partition(" with ")[0] if words.startswith("Checkpoint") else "Files validated,"
    assert installation.told() == [("I6", f"2 events say {said!r}")]


def test_an_ended_job_that_goes_on_talking_is_named(installation: Installation) -> None:
    installation.succeeded()
    message(installation, fail(installation), "one more thing")
    message(installation, installation.house.ended_job(), "one more thing")
    assert sorted(installation.told()) == [
        ("I2", "failed, but its last event does not say so"),
        ("I7", "cancelled, but its last event does not say so"),
    ]


def test_an_end_that_did_not_last_is_named(installation: Installation) -> None:
    job = installation.running()
    message(installation, job, "Fine-tuning job cancelled")
    assert installation.told() == [("I2", "running, though an event says 'Fine-tuning job cancelled'")]


def test_a_cancelled_job_whose_model_answers_is_named(installation: Installation) -> None:
    job = installation.running(steps=2)
    key = installation.weights(job, 2)
    jobs.cancel_job(installation.house.session, project_id=job.project_id, job_id=job.id)
    installation.house.session.commit()
    assert installation.told() == []
    model = installation.house.session.query(TunedModel).one()
    installation.set(TunedModel, model.id, is_checkpoint=False)
    assert installation.told() == [("I7", f"cancelled, yet {model.id} answers in chat")]
    assert key.is_dir()


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        (File, "belongs to another project than the job"),
        (TunedModel, "belongs to another project than the job"),
    ],
)
def test_what_a_job_names_of_another_project_is_named(
    installation: Installation, table: type[Any], problem: str
) -> None:
    job = installation.succeeded()
    other = make_caller(installation.house.session, "two").project_id
    row_id = job.training_file if table is File else f"{job.id}:ckpt-step-2"
    installation.set(table, row_id, project_id=other)
    assert installation.told() == [("I11", f"{row_id} {problem}")]


def test_weights_of_two_projects_under_one_key_are_named(installation: Installation) -> None:
    job = installation.succeeded()
    other = make_caller(installation.house.session, "two").project_id
    installation.set(TunedModel, model_of(installation, job).id, project_id=other)
    assert ("I11", "holds weights of more than one project") in installation.told()


def test_a_model_that_answers_with_weights_of_another_job_is_named(installation: Installation) -> None:
    first, second = installation.succeeded(), installation.succeeded()
    key = f"weights/{first.id}-1-2"
    old = installation.weights(second, 2)
    installation.set(TunedModel, f"{second.id}:ckpt-step-2", storage_key=key)
    for path in sorted(old.rglob("*"), reverse=True):
        path.unlink()
    old.rmdir()
    assert installation.told() == [("I11", f"answers with weights made by {first.id}")]


def test_a_checkpoint_with_the_model_of_another_job_is_named(installation: Installation) -> None:
    first, second = installation.succeeded(), installation.succeeded()
    installation.house.session.execute(
        update(Checkpoint)
        .where(Checkpoint.job_id == second.id, Checkpoint.step_number == 2)
        .values(model_id=f"{first.id}:ckpt-step-2")
    )
    installation.house.session.commit()
    problem = f"{first.id}:ckpt-step-2 was made by another job than its checkpoint"
    assert installation.told() == [("I11", problem)]


def test_two_files_over_the_same_bytes_are_named(installation: Installation) -> None:
    one, two = installation.house.file(), installation.house.file()
    installation.set(File, two.id, storage_key=one.storage_key)
    assert ("I11", "holds the bytes of more than one file") in installation.told()


def test_a_kept_answer_that_names_another_projects_job_is_named(installation: Installation) -> None:
    job = installation.succeeded()
    other = make_caller(installation.house.session, "two").project_id
    session = installation.house.session
    for project_id in (job.project_id, other):
        session.add(
            IdempotencyKey(
                project_id=project_id, key="k", fingerprint="0" * 64, response={"body": {"id": job.id}}
            )
        )
    session.commit()
    assert installation.told() == [("I11", f"its answer names {job.id} of another project")]


def test_answers_kept_too_long_are_noted(installation: Installation) -> None:
    session = installation.house.session
    old = utc_now() - timedelta(days=7)
    session.add(
        IdempotencyKey(
            project_id=installation.house.caller.project_id,
            key="k",
            fingerprint="0" * 64,
            response={},
            created_at=old,
        )
    )
    session.commit()
    assert installation.told() == []
    assert installation.told(strict=True) == [("I10", "kept longer than 48 h")]


def test_what_is_right_again_a_moment_later_is_no_finding(installation: Installation) -> None:
    job = installation.succeeded()
    installation.set(Job, job.id, trained_tokens=None)
    looks = 0

    def check(site: Any) -> Any:
        nonlocal looks
        looks += 1
        yield from survey.jobs.check_outcomes(site)
        installation.set(Job, job.id, trained_tokens=1)

    assert survey.survey(installation.site, settle_s=0, checks=[check]) == []
    assert looks == 2


def test_a_quiet_checkpoint_may_outlive_its_cancelled_job(installation: Installation) -> None:
    job = installation.running(steps=STEPS)
    jobs.cancel_job(installation.house.session, project_id=job.project_id, job_id=job.id)
    installation.house.session.commit()
    assert installation.told() == []
    assert job.status is JobStatus.CANCELLED

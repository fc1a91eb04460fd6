"""What the control worker does: reads a job's files before it may queue, and keeps house."""

from __future__ import annotations

import logging
import time
from typing import Any

from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from app.core import attempts, hyperparameters
from app.core.assessments import Answer, Question, answer
from app.core.db import transaction
from app.core.housekeeping import purge, sweep, tidy
from app.core.hyperparameters import Hyperparameters
from app.core.log import bind
from app.core.queue import Task
from app.core.status import JobStatus
from app.core.tables import Job
from worker.context import Context
from worker.estimates import estimate
from worker.inputs import JobInputError
from worker.validation import check_file

log = logging.getLogger(__name__)


def validate_job(context: Context, job_id: str) -> None:
    """Read the files of a job; queue it, or fail it with the line that is wrong."""
    with bind(job=job_id):
        _validate(context, job_id)


def _validate(context: Context, job_id: str) -> None:
    with transaction(context.sessions) as session:
        job = session.scalar(select(Job).where(Job.id == job_id, Job.status == JobStatus.VALIDATING_FILES))
    if job is None:
        return
    try:
        numbers, expected = assess(context, job)
    except JobInputError as bad:
        _fail(context, job_id, bad.error)
        return
    except (OSError, SQLAlchemyError):
        raise  # disk or database are away: housekeeping sends the job's hint again
    except Exception:  # a bug of ours would meet this file again and again, and the job would never end
        log.exception("validating job %s", job_id)
        text = "The job failed due to an error of the server while it read the files. Tell the operator"
        _fail(context, job_id, {"code": "server_error", "message": text, "param": None})
        return
    with transaction(context.sessions) as session:
        queued = attempts.finish_validation(
            session, job_id, hyperparameters=numbers.as_json(), estimate=expected
        )
        if queued is not None and queued.status is JobStatus.QUEUED:
            context.sender.hint_on_commit(session, Task.RUN_JOB, job_id)


def assess_job(context: Context, question: dict[str, Any]) -> None:
    """Answer what a job would take that is not created. Whoever asks is not told of errors of ours."""
    asked = Question.model_validate(question)
    if time.time() > asked.expires_at:
        return
    try:
        numbers, expected = assess(context, asked.job())
        found = Answer(hyperparameters=numbers.as_json(), estimate=expected)
    except JobInputError as bad:
        found = Answer(error=bad.error)
    answer(context.redis, asked, found)


def assess(context: Context, job: Job) -> tuple[Hyperparameters, dict[str, Any]]:
    """Read the files of a job; its numbers and what it will take. Raises JobInputError with what is wrong."""
    files = [check_file(context, job, "training_file")]
    if job.validation_file is not None:
        files.append(check_file(context, job, "validation_file"))
    numbers = hyperparameters.resolve(job.hyperparameters, n_examples=files[0].examples)
    return numbers, estimate(context, job, numbers, files)


def _fail(context: Context, job_id: str, error: dict[str, str | None]) -> None:
    with transaction(context.sessions) as session:
        attempts.fail_validation(session, job_id, error=error)
    log.info("job %s: %s", job_id, error["code"])


def keep_house(context: Context) -> None:
    """One round of housekeeping, unless another control worker is at it."""
    with transaction(context.sessions) as session:
        swept = sweep(session, context.storage, context.sender, context.settings)
    if swept is not None and (swept.requeued or swept.expired):
        log.info("housekeeping: %s", swept)


def remove_deleted(context: Context) -> None:
    """The part of housekeeping that waits for the disk."""
    with transaction(context.sessions) as session:
        count = purge(session, context.storage, context.settings)
    if count:
        log.info("housekeeping: %d things removed", count)


def tidy_up(context: Context) -> None:
    """The slower part of housekeeping: looks through the storage for what nobody needs."""
    with transaction(context.sessions) as session:
        count = tidy(session, context.storage, context.settings)
    if count:
        log.info("housekeeping: %d things without an owner removed", count)

"""What the control worker does: reads a job's files before it may queue, and keeps house."""

from __future__ import annotations

import logging
import time

from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from app.core import attempts, hyperparameters
from app.core.dataset import DatasetError, read_examples, read_lines
from app.core.db import transaction
from app.core.housekeeping import purge, sweep, tidy
from app.core.log import bind
from app.core.queue import Task
from app.core.status import JobStatus
from app.core.tables import Job
from worker.context import Context
from worker.inputs import JobInputError, find_input

log = logging.getLogger(__name__)
FRESH_S = 4.0  # how often a long validation says it is alive, so that nobody sends its hint again


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
        n_examples = _count_examples(context, job, "training_file")
        if job.validation_file is not None:
            _count_examples(context, job, "validation_file")
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
    resolved = hyperparameters.resolve(job.hyperparameters, n_examples=n_examples)
    with transaction(context.sessions) as session:
        queued = attempts.finish_validation(session, job_id, hyperparameters=resolved.as_json())
        if queued is not None and queued.status is JobStatus.QUEUED:
            context.sender.hint_on_commit(session, Task.RUN_JOB, job_id)


def _fail(context: Context, job_id: str, error: dict[str, str | None]) -> None:
    with transaction(context.sessions) as session:
        attempts.fail_validation(session, job_id, error=error)
    log.info("job %s: %s", job_id, error["code"])


def keep_house(context: Context) -> None:
    """One round of housekeeping, unless another control worker is at it."""
    with transaction(context.sessions) as session:
        swept = sweep(session, context.storage, context.sender, context.settings)
    with transaction(context.sessions) as session:
        purged = purge(session, context.storage, context.settings)
    if purged or (swept is not None and (swept.requeued or swept.expired)):
        log.info("housekeeping: %s, %d things removed", swept, purged)


def tidy_up(context: Context) -> None:
    """The slower part of housekeeping: looks through the storage for what nobody needs."""
    with transaction(context.sessions) as session:
        count = tidy(session, context.storage, context.settings)
    if count:
        log.info("housekeeping: %d things without an owner removed", count)


def _count_examples(context: Context, job: Job, param: str) -> int:
    """How many examples a file of the job holds; raises JobInputError."""
    file_id: str = getattr(job, param)
    name = param.replace("_", " ")
    with context.sessions() as session:
        path = find_input(context, session, file_id=file_id, param=param)
    count, fresh_at = 0, time.monotonic()
    try:
        with path.open("rb") as file:
            for _ in read_examples(read_lines(file, max_line_bytes=context.settings.max_line_bytes)):
                count += 1
                if time.monotonic() - fresh_at > FRESH_S:
                    fresh_at = time.monotonic()
                    _stay_fresh(context, job.id)
    except DatasetError as error:
        text = f"The job failed due to an invalid {name}. {error.message}"
        raise JobInputError(code=f"invalid_{param}", message=text, param=param) from None
    _check_count(context, param, count)
    return count


def _check_count(context: Context, param: str, count: int) -> None:
    settings = context.settings
    least = settings.min_examples if param == "training_file" else 1
    name = param.replace("_", " ").capitalize()
    if count < least:
        text = f"{name} has {count} example(s), but must have at least {least} examples"
        raise JobInputError(code="invalid_n_examples", message=text, param=param)
    if count > settings.max_examples:
        text = f"{name} has {count} examples, but may have at most {settings.max_examples}"
        raise JobInputError(code="invalid_n_examples", message=text, param=param)


def _stay_fresh(context: Context, job_id: str) -> None:
    with transaction(context.sessions) as session:
        attempts.stay_fresh(session, job_id)

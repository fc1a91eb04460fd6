"""`luthier: {"dry_run": true}`: the job as it would be once its files are checked, and nothing made."""

from __future__ import annotations

import threading

from app.api.context import Context
from app.api.job_desk import JobDesk
from app.api.schemas.job_objects import JobObject, job_object
from app.core import assessments, jobs
from app.core.assessments import Answer, Question
from app.core.db import transaction
from app.core.errors import Unavailable
from app.core.jobs import NewJob
from app.core.presence import list_present
from app.core.queue import Queue
from app.core.status import JobStatus

WAIT_S = 30.0  # files of some hundred megabytes are read in that time
MOST_AT_ONCE = 8  # of one process: each holds a thread while it waits
_places = threading.BoundedSemaphore(MOST_AT_ONCE)


def dry_run(desk: JobDesk, new: NewJob) -> JobObject:
    """The job object, `queued` with its estimate or `failed` with its error; its id leads nowhere."""
    context = desk.context
    with transaction(context.sessions) as session:  # ended before the wait, with its locks
        job = jobs.make_job(session, context.catalogue, caller=desk.caller, new=new)
    found = _answer(context, Question.about(job, wait_s=WAIT_S))
    job.status = JobStatus.QUEUED if found.error is None else JobStatus.FAILED
    job.error = found.error
    job.hyperparameters = found.hyperparameters or job.hyperparameters
    job.luthier = job.luthier | {"dry_run": True, "estimate": found.estimate}
    return job_object(job)


def _answer(context: Context, question: Question) -> Answer:
    if not _places.acquire(blocking=False):
        text = f"{MOST_AT_ONCE} dry runs are under way. Ask again in a moment."
        raise Unavailable(text, code="overloaded")
    try:
        if not list_present(context.redis, kind=str(Queue.CONTROL)):
            raise Unavailable("No control worker is running, which would read the files. Try again later.")
        found = assessments.ask(context.redis, context.sender, question)
    finally:
        _places.release()
    if found is None:
        raise Unavailable(
            f"The files were not read within {WAIT_S:g} s. Try again later, or create the job: it says what "
            "it will take before it runs."
        )
    return found

"""Who has to act decides whether a job is tried again: never by the user's fault, by the machine's it is."""

from __future__ import annotations

from app.core.attempts import Attempt
from app.core.status import JobStatus
from tests.worker.desk import Desk
from worker.runner import Runner
from worker.trainer import Trainer


def test_what_the_user_has_to_change_is_tried_once(desk: Desk, trainer: Trainer) -> None:
    job_id = desk.queue(luthier={"adapter": "lora", "rank": 2, "max_length": 2})
    Runner(desk.context, trainer).run_waiting()
    job = desk.job(job_id)
    assert (job.status, job.attempt, job.deaths) == (JobStatus.FAILED, 1, 0)
    assert job.error is not None
    assert (job.error["code"], job.error["param"]) == ("no_trainable_tokens", "training_file")
    assert desk.words(job_id)[-1] == job.error["message"]


def test_what_the_machine_did_is_tried_again_and_said(desk: Desk, trainer: Trainer) -> None:
    job_id = desk.queue()
    desk.context.storage.path(Attempt(job_id, 1).folder_key).write_bytes(b"in the way of the first attempt")
    Runner(desk.context, trainer).run_waiting()
    job = desk.job(job_id)
    assert (job.status, job.attempt, job.error) == (JobStatus.SUCCEEDED, 2, None)
    said = "The training worker had an unexpected error. The job is queued again (try 2 of 3)"
    assert said in desk.words(job_id)

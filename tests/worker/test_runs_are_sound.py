"""What real runs leave behind, good ones and bad ones, is sound to the strictest eyes of `fsck`."""

from __future__ import annotations

import os
import signal

from app.core.fsck import survey
from app.core.fsck.finding import Site
from app.core.status import JobStatus
from tests.core.installation import OWN_CHECKS
from tests.worker.desk import Desk, child_of, examples, running, wait_for, warm
from tests.worker.test_runner import at_work
from worker import control
from worker.runner import Runner
from worker.trainer import Trainer


def told(desk: Desk) -> list[tuple[str, str, str]]:
    """All that `fsck --strict` says once housekeeping has had its turn."""
    for part in (control.keep_house, control.remove_deleted, control.tidy_up, control.remove_deleted):
        part(desk.context)
    site = Site(desk.context.sessions, desk.context.storage, desk.context.settings)
    found = survey.survey(site, settle_s=0, checks=OWN_CHECKS)
    return [(finding.invariant, finding.subject, finding.problem) for finding in found]


def test_after_good_runs_of_every_kind_nothing_is_wrong(desk: Desk, trainer: Trainer) -> None:
    ids = [
        desk.queue(n_epochs=5, validation_file=desk.upload(examples(3)), suffix="shop"),
        desk.queue(luthier={"adapter": "full"}),
    ]
    Runner(desk.context, trainer).run_waiting()
    first = desk.job(ids[0]).fine_tuned_model
    assert first is not None
    ids.append(desk.queue(model=first, luthier={}))
    Runner(desk.context, trainer).run_waiting()
    assert [desk.job(job_id).status for job_id in ids] == [JobStatus.SUCCEEDED] * 3
    assert told(desk) == []


def test_after_runs_that_were_disturbed_nothing_is_wrong(desk: Desk, trainer: Trainer) -> None:
    desk = desk.with_settings(retry_pause_s=0.0, checkpoint_every_s=0.05)
    warm(trainer)
    shot, ended, rests = (desk.queue(n_epochs=4, batch_size=1) for _ in range(3))
    bad = desk.create(data=b"not json\n")
    control.validate_job(desk.context, bad)
    with at_work(Runner(desk.context, trainer)) as thread:
        wait_for(running(desk, shot, steps=15), timeout_s=60)
        os.kill(child_of(trainer), signal.SIGKILL)
        wait_for(running(desk, ended, steps=3), timeout_s=60)
        desk.cancel(ended)
        wait_for(running(desk, rests, steps=3), timeout_s=60)
        desk.pause(rests)
        wait_for(lambda: not thread.is_alive(), timeout_s=60)
    states = [desk.job(job_id).status for job_id in (shot, ended, rests, bad)]
    assert states == [JobStatus.SUCCEEDED, JobStatus.CANCELLED, JobStatus.PAUSED, JobStatus.FAILED]
    assert told(desk) == []

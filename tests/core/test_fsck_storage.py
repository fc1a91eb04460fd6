"""`fsck` over storage and processes: each test breaks one thing, sees it named, mends what is safe."""

from __future__ import annotations

import dataclasses
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest

from app.core import jobs
from app.core.attempts import Attempt
from app.core.db import utc_now
from app.core.fsck import processes, survey
from app.core.fsck.finding import Severity
from app.core.manifest import TRAINING_STATE, write_manifest
from app.core.status import JobStatus
from app.core.tables import Checkpoint, File, Job, TunedModel
from tests.core.installation import STEPS, Installation, fill, model_of

LONG_AGO = time.time() - 10 * 86_400


def impatient(installation: Installation, **changes: Any) -> Installation:
    """For whom everything is old. A file's change of name cannot be dated back."""
    site = dataclasses.replace(installation.site, orphan_age_s=0.0, **changes)
    return dataclasses.replace(installation, site=site)


def assert_mends(installation: Installation, *told: tuple[str, str]) -> None:
    """Exactly this is wrong, and after the repair nothing is."""
    assert installation.told(strict=True) == list(told)
    assert installation.mend() == len(told)
    assert installation.told(strict=True) == []
    assert installation.mend() == 0


# Files


def test_a_file_whose_bytes_are_gone_is_named(installation: Installation) -> None:
    file = installation.house.file()
    installation.house.storage.path(file.storage_key).unlink()
    assert [(f.invariant, f.subject, f.problem) for f in installation.findings()] == [
        ("I8", file.id, "its bytes are gone")
    ]


def test_a_file_cut_short_is_named_even_by_a_quick_look(installation: Installation) -> None:
    file = installation.house.file()
    path = installation.house.storage.path(file.storage_key)
    os.truncate(path, 7)
    quick = dataclasses.replace(installation, site=dataclasses.replace(installation.site, quick=True))
    for who in (installation, quick):
        assert who.told() == [("I8", f"it has 7 bytes instead of {file.size_bytes}")]


def test_one_changed_byte_of_a_file_is_named_but_by_a_quick_look(installation: Installation) -> None:
    file = installation.house.file()
    path = installation.house.storage.path(file.storage_key)
    path.write_bytes(b"X" + path.read_bytes()[1:])
    assert installation.told() == [("I8", "its bytes have changed since the upload")]
    quick = dataclasses.replace(installation, site=dataclasses.replace(installation.site, quick=True))
    assert quick.told() == []


def test_a_folder_in_place_of_a_files_bytes_is_named(installation: Installation) -> None:
    path = installation.house.storage.path(installation.house.file().storage_key)
    path.unlink()
    path.mkdir()
    assert installation.told() == [("I8", "in place of its bytes lies something that is no file")]


def test_a_key_that_leads_out_of_storage_is_named_and_not_followed(installation: Installation) -> None:
    file = installation.house.file()
    installation.set(File, file.id, storage_key="files/../../../etc/passwd")
    problem = "its storage key 'files/../../../etc/passwd' is none"
    assert ("I8", problem) in installation.told()


def test_bytes_without_a_file_go_once_they_are_old(installation: Installation) -> None:
    path = installation.house.storage.root / "files" / "file-unknown"
    path.write_bytes(b"x")
    assert installation.told() == []
    assert len(installation.told(strict=True)) == 1
    assert installation.mend() == 0
    assert_mends(impatient(installation), ("I10", "in storage, but no row needs it"))
    assert not path.exists()


def test_a_strange_name_in_storage_is_told_and_mended_as_any_other(installation: Installation) -> None:
    root = os.fsencode(installation.house.storage.root)
    Path(os.fsdecode(root + b"/files/\xff\n -rf")).write_bytes(b"x")
    Path(os.fsdecode(root + b"/weights/ftjob-x-1-2-3-4")).symlink_to("/etc")
    assert_mends(impatient(installation), *[("I10", "in storage, but no row needs it")] * 2)
    assert Path("/etc").is_dir()


def test_bytes_of_a_purged_file_go(installation: Installation) -> None:
    file = installation.house.file()
    installation.set(File, file.id, deleted_at=utc_now(), purged_at=utc_now())
    assert_mends(impatient(installation), ("I10", "in storage, but no row needs it"))


def test_a_deleted_file_without_bytes_is_marked_as_purged(installation: Installation) -> None:
    file = installation.house.file()
    installation.set(File, file.id, deleted_at=utc_now())
    assert installation.told(strict=True) == [("I10", "1 with their bytes")]
    installation.house.storage.delete(file.storage_key)
    installation.mend()
    assert installation.told(strict=True) == []


# Weights


def test_a_model_whose_folder_was_removed_is_named_with_its_name(installation: Installation) -> None:
    job = installation.succeeded()
    shutil.rmtree(installation.weights(job))
    names = sorted(finding.subject for finding in installation.findings())
    assert names == sorted([model_of(installation, job).id, f"{job.id}:ckpt-step-{STEPS}"])
    assert {problem for _, problem in installation.told()} == {
        f"cannot answer: its folder weights/{job.id}-1-{STEPS} is gone"
    }


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_one_changed_byte_of_a_models_weights_is_named(installation: Installation, name: str) -> None:
    job = installation.succeeded()
    path = installation.weights(job, 2) / name
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert installation.told() == [("I5", f"cannot answer: {name} has changed since it was written")]


def test_a_folder_without_its_manifest_is_named(installation: Installation) -> None:
    job = installation.succeeded()
    (installation.weights(job, 2) / "manifest.json").unlink()
    assert installation.told() == [("I5", "cannot answer: it has no manifest")]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda data: data[:8], "has no readable header"),
        (lambda data: data + b"\0" * 4, "is not as long as its tensors"),
        (lambda data: data.replace(b"[2, 3]", b"[2, 4]"), "has no readable header"),
        (lambda data: data.replace(b"[0, 24]", b"[4, 28]"), "has tensors that overlap or leave a gap"),
        (lambda data: data.replace(b'"F32"', b'"F99"'), "has no readable header"),
    ],
)
def test_weights_that_could_not_be_loaded_are_named_though_their_digest_fits(
    installation: Installation, change: Any, problem: str
) -> None:
    job = installation.succeeded()
    folder = installation.weights(job, 2)
    path = folder / "adapter_model.safetensors"
    path.write_bytes(change(path.read_bytes()))
    write_manifest(folder)
    assert installation.told() == [("I5", f"cannot answer: adapter_model.safetensors {problem}")]


def test_weights_of_another_kind_than_their_row_says_are_named(installation: Installation) -> None:
    job = installation.succeeded()
    installation.set(TunedModel, f"{job.id}:ckpt-step-2", kind="full")
    assert installation.told() == [("I5", "cannot answer: config.json is missing")]


def test_a_checkpoint_whose_training_state_is_damaged_is_not_resumed_from_any_more(
    installation: Installation,
) -> None:
    job = installation.running(steps=2)
    state = installation.weights(job, 2) / TRAINING_STATE / "position.json"
    state.write_text('{"step": 9}')
    problem = f"cannot be resumed: {TRAINING_STATE}/position.json has changed since it was written"
    assert installation.told() == [("I5", problem)]
    assert installation.mend() == 1
    assert installation.told() == []  # chat goes on with it
    assert installation.mend() == 1  # and the useless state goes
    assert not state.exists()


def test_a_checkpoint_whose_folder_is_gone_is_not_resumed_from_any_more(installation: Installation) -> None:
    job = installation.running(steps=2)
    shutil.rmtree(installation.weights(job, 2))
    assert len(installation.findings()) == 2
    installation.mend()
    assert [finding.invariant for finding in installation.findings()] == ["I5"]  # its name cannot answer


def test_a_training_state_that_nothing_resumes_from_goes(installation: Installation) -> None:
    job = installation.succeeded()
    (installation.weights(job) / TRAINING_STATE).mkdir()
    assert_mends(installation, ("I10", "keeps a training state that nothing resumes from"))
    assert installation.weights(job).is_dir()


def test_a_resumable_checkpoint_of_an_ended_job_is_noted(installation: Installation) -> None:
    job = installation.succeeded()
    shutil.rmtree(installation.weights(job, 2))
    fill(installation.weights(job, 2))
    checkpoint = installation.house.session.query(Checkpoint).filter_by(step_number=2).one()
    installation.set(Checkpoint, checkpoint.id, resumable=True)
    problem = "its job has succeeded, and its training state is not settled yet"
    assert installation.told() == []
    assert installation.told(strict=True) == [("I10", problem)]


def test_weights_nobody_names_go_once_their_attempt_is_over(installation: Installation) -> None:
    job = installation.running()
    fill(installation.weights(job))
    assert installation.told() == []  # the attempt may be about to write the row
    installation.set(Job, job.id, attempt=2)
    assert installation.told() == [("I10", "in storage, but no row needs it")]
    assert installation.mend() == 1
    assert not installation.weights(job).exists()


def test_weights_of_a_deleted_model_are_housekeepings_to_remove(installation: Installation) -> None:
    job = installation.succeeded()
    installation.set(TunedModel, f"{job.id}:ckpt-step-2", deleted_at=utc_now())
    assert installation.told() == []
    assert installation.told(strict=True) == [("I10", "deleted, its weights not yet")]
    shutil.rmtree(installation.weights(job, 2))
    assert_mends(installation, ("I10", "deleted, its weights gone"))


def test_weights_of_a_purged_model_go(installation: Installation) -> None:
    job = installation.succeeded()
    installation.set(TunedModel, f"{job.id}:ckpt-step-2", deleted_at=utc_now(), purged_at=utc_now())
    assert_mends(installation, ("I10", "in storage, but no row needs it"))
    assert installation.weights(job).is_dir()


# Attempts and half-written files


def test_the_folder_of_an_attempt_goes_when_the_attempt_is_over(installation: Installation) -> None:
    job = installation.running()
    folder = installation.house.storage.path(Attempt(job.id, 1).folder_key)
    (folder / ".partial-step-1").mkdir(parents=True)
    assert installation.told() == []
    installation.set(
        Job, job.id, status=JobStatus.QUEUED, lease_expires_at=None, worker=None, hinted_at=utc_now()
    )
    assert installation.told() == [("I10", "in storage, but no row needs it")]
    assert installation.mend() == 1
    assert not folder.exists()


def test_a_worker_may_take_a_moment_to_clear_up_after_a_cancel(installation: Installation) -> None:
    job = installation.running()
    installation.house.storage.path(Attempt(job.id, 1).folder_key).mkdir()
    jobs.cancel_job(installation.house.session, project_id=job.project_id, job_id=job.id)
    installation.house.session.commit()
    assert installation.told() == []
    assert [invariant for invariant, _ in installation.told(strict=True)] == ["I10"]
    installation.set(Job, job.id, finished_at=utc_now() - timedelta(seconds=20))
    assert installation.told() == [("I10", "in storage, but no row needs it")]


def test_the_folder_of_an_attempt_that_runs_again_meanwhile_is_left_alone(installation: Installation) -> None:
    job = installation.running()
    folder = installation.house.storage.path(Attempt(job.id, 1).folder_key)
    folder.mkdir()
    installation.set(Job, job.id, status=JobStatus.PAUSED)
    [finding] = [f for f in installation.findings() if f.invariant == "I10"]
    installation.set(Job, job.id, status=JobStatus.RUNNING)
    assert not survey.mend(installation.site, finding)
    assert folder.is_dir()


def test_an_upload_in_progress_is_noted_and_an_abandoned_one_goes(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = installation.house.storage.root / "tmp" / "half"
    path.write_bytes(b"x")
    assert installation.told() == []
    assert installation.told(strict=True) == [("I10", "unfinished, an upload in progress or its remains")]
    assert installation.mend() == 0
    monkeypatch.setattr("app.core.fsck.leftovers.STALE_S", -1)
    assert_mends(installation, ("I10", "unfinished and abandoned"))
    assert not path.exists()


# Processes


@contextmanager
def trainer(*, worker: str, orphan: bool) -> Iterator[psutil.Process]:
    """A process that looks like a trainer, of this process or of one that has gone."""
    words = [sys.executable, "-c", "import time; time.sleep(60)", "-m", "worker.training", "--worker", worker]
    quiet = "start_new_session=True, stdout=-3, stderr=-3"
    start = f"import subprocess; print(subprocess.Popen({words!r}, {quiet}).pid)"
    if orphan:
        done = subprocess.run([sys.executable, "-c", start], capture_output=True, text=True, check=True)
        process = psutil.Process(int(done.stdout))
        child = None
    else:
        child = subprocess.Popen(words, start_new_session=True)
        process = psutil.Process(child.pid)
    try:
        yield process
    finally:
        if process.is_running():
            process.kill()
        if child is not None:
            child.wait()


def told_of(installation: Installation, process: psutil.Process) -> list[Any]:
    found = survey.survey(installation.site, settle_s=0, checks=[processes.check_trainers])
    return [finding for finding in found if finding.subject == f"process {process.pid}"]


def test_a_trainer_under_its_worker_is_as_it_should_be(installation: Installation) -> None:
    for worker in (f"{socket.gethostname()}-{os.getpid()}-a1B2c3", "elsewhere-1-a1B2c3"):
        with trainer(worker=worker, orphan=False) as process:
            assert told_of(installation, process) == []


def test_a_trainer_without_its_worker_is_named_and_ended(installation: Installation) -> None:
    gone = f"{socket.gethostname()}-{2**22 + 1}-a1B2c3"
    with trainer(worker=gone, orphan=True) as process:
        [finding] = told_of(installation, process)
        assert (finding.invariant, finding.severity) == ("I10", Severity.ERROR)
        assert finding.problem == f"a trainer without its worker {gone}"
        assert survey.mend(installation.site, finding)
        assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
        assert told_of(installation, process) == []


def test_a_trainer_under_another_process_than_its_worker_is_named(installation: Installation) -> None:
    with trainer(worker=f"{socket.gethostname()}-{2**22 + 1}-a1B2c3", orphan=False) as process:
        assert len(told_of(installation, process)) == 1


def test_a_process_id_that_came_again_is_not_killed(installation: Installation) -> None:
    with trainer(worker=f"{socket.gethostname()}-{os.getpid()}-a1B2c3", orphan=False) as process:
        assert not processes._end(installation.house.session, pid=process.pid, begun=0.0)
        assert process.is_running()

"""Faults of storage: no room, fsync that fails, bytes that change, files that are deleted while in use."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import openai

from app.core.manifest import DamagedError, verify
from tests.chaos import truth
from tests.chaos.faults import Run, fault
from tests.chaos.saves import traced
from tests.chaos.training import INTERVAL, STEPS, messages
from tests.chaos.workload import training_lines

ROOM = 8 * 2**20  # bytes that are left of the volume
SMALL = 2**20  # what others may write meanwhile


@contextmanager
def filled(run: Run, *, leave: int) -> Iterator[bool]:
    """The storage's volume with so little room; False where there is no volume of our own to fill."""
    if not run.service.has_volume:
        run.skipped = "a tmpfs cannot be mounted here"
        yield False
        return
    ballast = run.service.storage / "ballast"
    over = threading.Event()
    filler = threading.Thread(target=keep_full, args=(ballast, leave, over), daemon=True)
    filler.start()
    try:
        while room(run) > 2 * leave:
            time.sleep(0.02)
        yield True
    finally:
        over.set()
        filler.join()
        ballast.unlink(missing_ok=True)


def keep_full(ballast: Path, leave: int, over: threading.Event) -> None:
    """Let the file grow into all room there is until the fault is over; others write and delete meanwhile."""
    with ballast.open("wb") as file:
        while not over.wait(0.05):
            volume = os.statvfs(ballast.parent)
            spare = volume.f_bavail * volume.f_bsize - leave
            with suppress(OSError):  # somebody was quicker
                if spare > 0:
                    os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, spare)


def room(run: Run) -> int:
    """Free bytes of the volume."""
    volume = os.statvfs(run.service.storage)
    return volume.f_bavail * volume.f_bsize


@fault(
    "F33",
    "an upload onto 8 MB of room",
    bar="507, no row, no partial file, the room is back <= 60 s",
    n=1,
    n_all=3,
)
def upload_without_room(run: Run) -> None:
    data = training_lines(20) * 8000
    for _ in run.rounds():
        with filled(run, leave=ROOM) as full:
            if not full:
                return
            files = count_files(run)
            try:
                run.tenant.client.files.create(file=("big.jsonl", data), purpose="fine-tune")
                run.check(False, "an upload larger than the room was accepted")
            except openai.APIStatusError as error:
                run.check(error.status_code == 507, f"answered with {error.status_code}: {error.message}")
            except openai.APIConnectionError as error:
                run.check(False, f"no answer: {error!r}")
            run.check(count_files(run) == files, "the refused upload left a row")
            deadline = time.monotonic() + 60
            while room(run) < ROOM - SMALL and time.monotonic() < deadline:
                time.sleep(0.1)
            run.check(room(run) >= ROOM - SMALL, "the room is not back after 60 s")
            run.check(not list((run.service.storage / "tmp").iterdir()), "a partial file is left")
            small = run.tenant.upload_bytes(training_lines(30))
            run.tenant.insist(lambda small=small: run.tenant.client.files.delete(small))


def count_files(run: Run) -> int:
    """All files there are."""
    return int(truth.rows(run.service.engine, "SELECT count(*) AS n FROM files")[0].n)


@fault(
    "F34",
    "the volume fills up while a job saves",
    bar="the last good checkpoint stays; the job waits or fails with storage_full; freed, it resumes",
    n=1,
    n_all=3,
)
def save_without_room(run: Run) -> None:
    whole = run.start_job(steps=STEPS, checkpoint_interval=INTERVAL)
    run.finish([whole])
    wanted = truth.adapter_digest(run.service, whole)
    for _ in run.rounds():
        with run.pace(0.1):
            job = run.start_job(steps=STEPS, checkpoint_interval=INTERVAL)
            run.wait_step(job, after=INTERVAL + 1)
            with filled(run, leave=4096) as full:
                if not full:
                    return
                run.wait_step(job, after=2 * INTERVAL)
                time.sleep(0.5)
            run.finish([job])
        told = run.tenant.get(job)
        run.check(
            told.status == "succeeded", f"{job}, its room given back soon, is {told.status}: {told.error}"
        )
        same = told.status == "succeeded" and truth.adapter_digest(run.service, job) == wanted
        run.check(same, f"{job}: its adapter differs")
        with run.pace(0.1):
            starved = run.start_job(steps=STEPS, checkpoint_interval=INTERVAL)
            run.may_fail.add(starved)
            run.wait_step(starved, after=INTERVAL + 1)
            with filled(run, leave=4096):
                run.finish([starved])
        told = run.tenant.get(starved)
        code = told.error.code if told.error else None
        run.check(
            (told.status, code) == ("failed", "storage_full"), f"{starved} is {told.status}: {told.error}"
        )
        kept = checkpoint_folders(run, starved)
        run.check(len(kept) > 0, f"{starved} kept no checkpoint")
        for folder in kept:
            verify(folder)


def checkpoint_folders(run: Run, job: str) -> list[Path]:
    """Where the checkpoints of a job lie, the newest first."""
    found = truth.rows(
        run.service.engine,
        "SELECT m.storage_key FROM checkpoints c JOIN tuned_models m ON m.id = c.model_id"
        " WHERE c.job_id = :job AND m.deleted_at IS NULL ORDER BY c.step_number DESC",
        job=job,
    )
    return [run.service.storage / row.storage_key for row in found]


@fault("F35", "fsync answers EIO", bar="not counted as saved; the job goes on and ends whole", n=1, n_all=4)
def failing_sync(run: Run) -> None:
    if shutil.which("strace") is None:
        run.skipped = "strace is not installed"
        return
    whole = run.start_job(steps=STEPS, checkpoint_interval=INTERVAL)
    run.finish([whole])
    wanted = truth.adapter_digest(run.service, whole)
    for _ in run.rounds():
        with run.pace(0.15):
            job = run.start_job(steps=STEPS, checkpoint_interval=INTERVAL)
            run.wait_step(job, after=2)
            trainer = run.worker_of(job).trainer()
            assert trainer is not None
            inject = f"inject=fsync:error=EIO:when={run.chance.randint(1, 6)}+"
            with traced(trainer.pid, "-e", "trace=fsync", "-e", inject):
                run.wait_step(job, after=INTERVAL + 1)
                for folder in checkpoint_folders(run, job):
                    verify(folder, with_state=True)
            run.finish([job])
        run.check(truth.adapter_digest(run.service, job) == wanted, f"{job}: its adapter differs")
        files = count_files(run)
        with traced(run.service.pid_of("api"), "-e", "trace=fsync", "-e", "inject=fsync:error=EIO"):
            try:
                run.tenant.client.files.create(file=("a.jsonl", training_lines(40)), purpose="fine-tune")
                run.check(False, "an upload whose fsync failed was accepted")
            except openai.APIStatusError as error:
                run.notes.append(f"an upload is answered with {error.status_code}")
        run.check(count_files(run) == files, "an upload whose fsync failed left a row")


@fault(
    "F36",
    "one byte flipped at 500 places, every file cut short",
    bar="always seen; the checkpoint before is used; a damaged adapter is never served",
    n=60,
    n_all=500,
)
def flip_bytes(run: Run) -> None:
    with run.pace(0.15):
        job = run.start_job(steps=STEPS, checkpoint_interval=INTERVAL)
        run.wait_step(job, after=2 * INTERVAL + 1)
        run.tenant.act(job, "pause")
        run.check(run.tenant.wait(job).status == "paused", f"{job} did not pause")
    folders = checkpoint_folders(run, job)
    copy = run.service.chaos / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folders[0], copy)
    verify(copy, with_state=True)
    unseen = [place for _ in range(run.n) if (place := flip_unseen(run, copy))]
    run.runs += run.n
    for file in sorted(path for path in copy.rglob("*") if path.is_file() and path.stat().st_size):
        whole = file.read_bytes()
        file.write_bytes(whole[: run.chance.randrange(len(whole))])
        unseen += [] if is_damaged(copy) else [f"{file.name} cut short"]
        file.write_bytes(whole)
    run.check(not unseen, f"damage not seen: {unseen[:5]}")
    victim = run.chance.choice(
        [path for path in folders[0].rglob("*") if path.stat().st_size and path.is_file()]
    )
    damaged = bytearray(victim.read_bytes())
    damaged[run.chance.randrange(len(damaged))] ^= 0x10
    victim.write_bytes(damaged)
    run.tenant.act(job, "resume")
    run.finish([job])
    whole_job = run.start_job(steps=STEPS, checkpoint_interval=INTERVAL)
    run.finish([whole_job])
    wanted = truth.adapter_digest(run.service, whole_job)
    run.check(
        truth.adapter_digest(run.service, job) == wanted, f"{job}: after {victim.name} its adapter differs"
    )
    warned = [event for event in messages(run, job) if event.level == "warn"]  # type: ignore[attr-defined]
    run.check(len(warned) > 0, f"no event tells that {victim.name} was damaged")
    serve_damaged(run, whole_job)


def flip_unseen(run: Run, folder: Path) -> str:
    """Flip one bit of one byte and put it back; the place where that was not seen."""
    file = run.chance.choice([path for path in folder.rglob("*") if path.is_file() and path.stat().st_size])
    at = run.chance.randrange(file.stat().st_size)
    whole = file.read_bytes()
    changed = bytearray(whole)
    changed[at] ^= 1 << run.chance.randrange(8)
    file.write_bytes(changed)
    seen = is_damaged(folder)
    file.write_bytes(whole)
    return "" if seen else f"{file.name} at {at} of {len(whole)}: {whole[at]:#x}"


def is_damaged(folder: Path) -> bool:
    """Whether a reader of checkpoints refuses the folder."""
    try:
        verify(folder, with_state=True)
    except DamagedError:
        return True
    return False


def serve_damaged(run: Run, job: str) -> None:
    """A model whose weights changed on disk is refused; put right, it answers."""
    name = run.tenant.get(job).fine_tuned_model
    [row] = truth.rows(run.service.engine, "SELECT storage_key FROM tuned_models WHERE id = :name", name=name)
    file = next((run.service.storage / row.storage_key).glob("*.safetensors"))
    whole = file.read_bytes()
    changed = bytearray(whole)
    changed[run.chance.randrange(len(whole) // 2, len(whole))] ^= 1
    file.write_bytes(changed)
    inference = run.service.parts["inference"]
    inference.stop()  # it read the weights when they were new and whole
    inference.start()
    run.service.wait_ready()
    try:
        run.tenant.chat(name)
        run.check(False, "a damaged adapter answered")
    except openai.APIStatusError as error:
        run.check(error.status_code in (409, 503), f"a damaged adapter is answered with {error.status_code}")
    run.tenant.chat("tiny")
    file.write_bytes(whole)
    run.tenant.insist(lambda: run.tenant.chat(name), patience_s=40)


@fault(
    "F37",
    "the training file is deleted while its job is queued, then running",
    bar="409, or the job is unaffected",
    n=2,
    n_all=6,
)
def delete_input(run: Run) -> None:
    for _ in run.rounds():
        with run.pace(0.1):
            for state in ("queued", "running"):
                busy = run.start_jobs(2, steps=9) if state == "queued" else []
                file = run.tenant.upload_bytes(training_lines(12, word=str(run.chance.random())))
                job = run.tenant.create(steps=9, file=file)
                run.jobs.add(job)
                if state == "running":
                    run.wait_step(job)
                try:
                    run.tenant.insist(lambda file=file: run.tenant.client.files.delete(file))
                    run.notes.append(f"{state}: deleted")
                except openai.APIStatusError as error:
                    run.notes.append(f"{state}: {error.status_code} {error.code}")
                    refused = error.status_code in (400, 409) and error.code is not None
                    run.check(refused, f"DELETE is answered with {error.status_code}, {error.code}")
                run.finish([job, *busy])
                run.check(run.tenant.get(job).status == "succeeded", f"{job} is {run.tenant.get(job).status}")

"""F04: a kill at every system call of a checkpoint's save, and of what the worker does to publish."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from app.core.manifest import verify
from tests.chaos import truth
from tests.chaos.faults import Run, fault
from tests.chaos.parts import Part
from tests.chaos.workload import training_lines
from worker.training.words import Adapter, TrainSpec

CHANGES = (
    "rename,renameat,renameat2,fsync,fdatasync,write,pwrite64,mkdir,mkdirat,unlink,unlinkat,rmdir,ftruncate"
)
PUBLISHING = "rename,renameat,renameat2,fsync,fdatasync,mkdir,mkdirat,unlink,unlinkat,rmdir"
STEPS, INTERVAL = 6, 3  # two saves: one with nothing before it, one with a checkpoint behind it


class Forge:
    """The forked trainings: runs a spec, killed at the n-th of its changing system calls or not at all."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.folder = folder
        self._model = run.service.folder / "tiny"
        (folder / "train.jsonl").write_bytes(training_lines(12))
        self._program = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.forked_training"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def train(self, name: str, *, resume_from: tuple[str, ...] = (), strace: list[str] | None = None) -> int:
        """One training into the folder of that name; its exit status."""
        spec = TrainSpec(
            job_id="job",
            attempt=1,
            base_model_dir=str(self._model),
            training_file=str(self.folder / "train.jsonl"),
            output_dir=str(self.folder / name),
            adapter=Adapter.LORA,
            n_epochs=2,
            batch_size=4,
            seed=7,
            checkpoint_interval=INTERVAL,
            resume_from=resume_from,
        )
        stdin, stdout = self._program.stdin, self._program.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(spec.model_dump_json() + "\n")
        stdin.flush()
        child = int(stdout.readline())
        if strace is None:
            os.kill(child, signal.SIGCONT)
            return int(stdout.readline())
        with traced(child, *strace):
            os.kill(child, signal.SIGCONT)
            return int(stdout.readline())

    def checkpoints(self, name: str) -> list[Path]:
        """Those that are visible, the newest first."""
        found = (self.folder / name).glob("step-*")
        return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)

    def adapter(self, name: str) -> str:
        """Digest of the newest checkpoint's weights."""
        digest = hashlib.sha256()
        for file in sorted(self.checkpoints(name)[0].glob("*.safetensors")):
            digest.update(file.read_bytes())
        return digest.hexdigest()

    def close(self) -> None:
        """End the program."""
        self._program.kill()
        self._program.wait()


@contextmanager
def traced(pid: int, *options: str) -> Iterator[None]:
    """strace on a process and all its threads, as long as the block lasts."""
    tracer = subprocess.Popen(
        ["strace", "-f", "-q", "-p", str(pid), *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert tracer.stderr is not None
    deadline = time.monotonic() + 10
    while f"TracerPid:\t{tracer.pid}" not in Path(f"/proc/{pid}/status").read_text():
        if time.monotonic() > deadline or tracer.poll() is not None:
            tracer.kill()
            raise TimeoutError(f"strace did not attach to {pid}: {tracer.stderr.read().decode()}")
        time.sleep(0.005)
    try:
        yield
    finally:
        if tracer.poll() is None:
            tracer.send_signal(signal.SIGINT)
        tracer.wait(timeout=20)


@fault(
    "F04",
    "kill -9 at every system call of a save and of a publish",
    bar="old or new, never a mix; resume always works, and gives the same adapter",
    n=10,
    n_all=10_000,
)
def kill_in_save(run: Run) -> None:
    if shutil.which("strace") is None:
        run.skipped = "strace is not installed"
        return
    folder = run.service.chaos / "saves"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    forge = Forge(run, folder)
    try:
        kill_in_checkpoint(run, forge)
    finally:
        forge.close()
    kill_in_publish(run)


def kill_in_checkpoint(run: Run, forge: Forge) -> None:
    """Count the calls of an undisturbed run, then kill at each of them."""
    log = forge.folder / "calls"
    code = forge.train("whole", strace=["-e", f"trace={CHANGES}", "-o", str(log)])
    run.check(code == 0, f"the undisturbed training ended with {code}")
    wanted = forge.adapter("whole")
    calls = calls_of(log)
    chosen = calls if run.n >= len(calls) else run.chance.sample(calls, run.n)
    survived = 0
    for name, number in chosen:
        run.runs += 1
        at = f"{name} {number}"
        inject = ["-e", f"trace={name}", "-e", f"inject={name}:signal=KILL:when={number}", "-o", "/dev/null"]
        code = forge.train("killed", strace=inject)
        survived += code == 0
        whole = forge.checkpoints("killed")
        for checkpoint in whole:
            verify(checkpoint, with_state=True)
        code = forge.train("resumed", resume_from=tuple(map(str, whole)))
        run.check(code == 0, f"killed at {at}: the resume ended with {code}")
        if code == 0:
            last = "resumed" if forge.checkpoints("resumed") else "killed"  # its last save was whole
            run.check(forge.adapter(last) == wanted, f"killed at {at}: the adapter differs")
        for left in ("killed", "resumed"):
            shutil.rmtree(forge.folder / left, ignore_errors=True)
    run.notes.append(f"save: {len(chosen)} of {len(calls)} calls, {len(chosen) - survived} kills")


def kill_in_publish(run: Run) -> None:
    """The same on the worker, while it publishes the checkpoints and the result of a job."""
    service = run.service
    log = service.chaos / "calls"
    whole = run.start_job(steps=STEPS, checkpoint_interval=INTERVAL)
    run.finish([whole])
    wanted = truth.adapter_digest(service, whole)
    alone = service.parts["training-a"]
    with only_worker(run), traced(alone.pid, "-e", f"trace={PUBLISHING}", "-o", str(log)):
        run.finish([run.start_job(steps=STEPS, checkpoint_interval=INTERVAL)])
        time.sleep(1)
    calls = calls_of(log)
    chosen = calls if run.n >= len(calls) else run.chance.sample(calls, min(3, len(calls)))
    kills = 0
    for name, number in chosen:
        run.runs += 1
        at = f"{name} {number}"
        inject = f"inject={name}:signal=KILL:when={number}"
        with only_worker(run):
            with traced(alone.pid, "-e", f"trace={name}", "-e", inject, "-o", "/dev/null"):
                job = run.start_job(steps=STEPS, checkpoint_interval=INTERVAL)
                wait_end(run, job, alone)
            kills += not alone.is_alive
        run.finish([job])
        run.check(truth.adapter_digest(service, job) == wanted, f"publish killed at {at}: it differs")
    run.notes.append(f"publish: {len(chosen)} of {len(calls)} calls, {kills} kills")


def calls_of(log: Path) -> list[tuple[str, int]]:
    """Each call of the busiest thread as strace counts it for `when`: by thread, and by the call's name."""
    found: dict[str, list[str]] = defaultdict(list)
    for line in log.read_text().splitlines():
        call = re.match(r"(?:(\d+) +)?(\w+)\(", line)  # a process without threads has no number before it
        if call is not None:
            found[call[1] or ""].append(call[2])
    names = max(found.values(), key=len, default=[])
    return [(name, names[: at + 1].count(name)) for at, name in enumerate(names)]


@contextmanager
def only_worker(run: Run) -> Iterator[None]:
    """Without the second training worker; what is missing afterwards is started again."""
    run.service.wait_ready()
    run.service.parts["training-b"].stop()
    try:
        yield
    finally:
        run.mend(0.1)


def wait_end(run: Run, job: str, worker: Part, *, timeout_s: float = 60.0) -> None:
    """Until the job has ended or its worker has."""
    deadline = time.monotonic() + timeout_s
    statement = "SELECT 1 FROM jobs WHERE id = :job AND finished_at IS NOT NULL"
    while worker.is_alive and time.monotonic() < deadline:
        if truth.rows(run.service.engine, statement, job=job):
            time.sleep(1.0)  # the attempt's folder goes after the row
            return
        time.sleep(0.05)

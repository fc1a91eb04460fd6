"""Nothing that a trainer started outlives it, however it hides and whoever dies first."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from app.core.failures import FailureCode
from tests.worker.desk import wait_for
from worker import cgroup
from worker.cgroup import Cgroup
from worker.process_tree import ProcessTree
from worker.trainer import Trainer, TrainerDiedError

# Leaves group, session and parent behind, as a daemon does, and writes down who it is.
HIDE = """
import os, signal, sys, time
def hide(path):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            note(path, os.getpid())
            time.sleep(300)
        os._exit(0)
    os.wait()
def note(path, number):
    with open(path + ".part", "w") as file:
        file.write(str(number))
    os.rename(path + ".part", path)
"""
WORKER = """
import sys, time
from worker import cgroup
from worker.trainer import Trainer
if {is_without_groups}:
    cgroup._groups_of = lambda _pid: iter(())
sys.executable = {starter!r}
trainer = Trainer(grace_s=1, worker="test")
trainer.start()
print(trainer._process.pid, trainer._tree._guard.pid, flush=True)
time.sleep(300)
"""
PYTHON = sys.executable


def is_alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class Stage:
    """Trainers whose child is a program of the test's."""

    def __init__(self, folder: Path) -> None:
        self.noted = folder / "noted"  # a number that the program writes down with `note`
        self.starter = folder / "python"
        self._program = folder / "program.py"
        child = f"exec {PYTHON} {self._program}"
        text = f'#!/bin/sh\nif [ "$3" = worker.training ]; then {child}; fi\nexec {PYTHON} "$@"\n'
        self.starter.write_text(text)
        self.starter.chmod(0o755)
        self.is_without_groups = False
        self.trainers: list[Trainer] = []

    def write(self, program: str) -> None:
        self._program.write_text(HIDE + program.replace("NOTED", repr(str(self.noted))))

    def start(self, program: str, *, grace_s: float = 0.5, memory_bytes: int | None = None) -> Trainer:
        self.write(program)
        trainer = Trainer(grace_s=grace_s, worker="test", memory_bytes=memory_bytes)
        self.trainers.append(trainer)
        trainer.start()
        return trainer

    def number(self) -> int:
        wait_for(self.noted.exists)
        return int(self.noted.read_text())


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    stage = Stage(tmp_path)
    monkeypatch.setattr(sys, "executable", str(stage.starter))
    yield stage
    for trainer in stage.trainers:
        trainer.stop()


@pytest.fixture(params=["with cgroups", "without"])
def _groups(request: pytest.FixtureRequest, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cgroups of this machine, if it has any, and a machine without."""
    if request.param == "without":
        stage.is_without_groups = True
        monkeypatch.setattr(cgroup, "_groups_of", lambda _pid: iter(()))


@pytest.fixture
def group() -> Iterator[Cgroup]:
    """A group that counts memory and processes, where the machine lets us make one."""
    group = Cgroup.make("test")
    yield group
    group.remove()


def needs(group: Cgroup, *names: str) -> None:
    if not any((folder / name).exists() for folder in group.folders for name in names):
        pytest.skip(f"no writable cgroup with {' or '.join(names)} here")


@pytest.mark.usefixtures("_groups")
def test_kill_ends_what_hides_in_a_session_of_its_own(stage: Stage) -> None:
    trainer = stage.start("hide(NOTED); time.sleep(300)")
    hidden = stage.number()
    assert psutil.Process(hidden).ppid() == 1  # nobody's child any more
    began = time.monotonic()
    assert trainer.kill()
    assert time.monotonic() - began < 2
    assert not is_alive(hidden)
    assert trainer.kill()


@pytest.mark.usefixtures("_groups")
def test_a_new_child_starts_only_once_all_of_the_last_one_is_gone(stage: Stage) -> None:
    trainer = stage.start("hide(NOTED)")  # ends, and leaves somebody behind
    hidden = stage.number()
    with pytest.raises(TrainerDiedError, match="exit code 0"):
        trainer.next_word(timeout_s=20)
    assert is_alive(hidden)
    trainer.start()
    assert not is_alive(hidden)


@pytest.mark.usefixtures("_groups")
def test_what_a_job_leaves_behind_is_ended_and_the_child_stays_warm(stage: Stage) -> None:
    trainer = stage.start("hide(NOTED); time.sleep(300)")
    hidden = stage.number()
    process = trainer._process
    assert process is not None
    trainer.end_strays()
    assert not is_alive(hidden)
    assert is_alive(process.pid)


def test_nothing_starts_beside_a_process_that_cannot_be_ended(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = stage.start("time.sleep(300)")
    with monkeypatch.context() as patch:
        patch.setattr(ProcessTree, "kill", lambda _tree: False)
        assert not trainer.kill()
        with pytest.raises(TrainerDiedError, match="hold the device"):
            trainer.start()
    trainer.start()
    assert trainer.kill()


def test_kill_does_not_wait_for_a_stop_in_progress(stage: Stage) -> None:
    program = "signal.signal(signal.SIGTERM, signal.SIG_IGN); note(NOTED, 1); time.sleep(300)"
    trainer = stage.start(program, grace_s=60.0)
    stage.number()
    stopping = threading.Thread(target=trainer.stop)
    stopping.start()
    time.sleep(0.2)
    began = time.monotonic()
    assert trainer.kill()
    stopping.join(timeout=10)
    assert time.monotonic() - began < 3


def test_a_fork_bomb_meets_its_limit_and_is_ended(
    stage: Stage, group: Cgroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs(group, "pids.max")
    monkeypatch.setattr(cgroup, "MAX_PROCESSES", 64)
    trainer = stage.start(
        "time.sleep(0.5)\n"  # it is in its group by now
        "while True:\n"
        "    try:\n"
        "        if os.fork() == 0: os.setsid()\n"
        "    except OSError:\n"
        "        note(NOTED, 1) if not os.path.exists(NOTED) else time.sleep(0.01)\n"
    )
    stage.number()
    assert trainer._tree is not None
    assert 32 < len(trainer._tree.members()) <= 64
    began = time.monotonic()
    assert trainer.kill()
    assert time.monotonic() - began < 5
    assert trainer._tree.members() == []


def test_a_child_ended_for_lack_of_memory_is_told_so(stage: Stage, group: Cgroup) -> None:
    needs(group, "memory.max", "memory.limit_in_bytes")
    trainer = stage.start("time.sleep(0.3); b'x' * 500_000_000", memory_bytes=100_000_000)
    with pytest.raises(TrainerDiedError, match="ran out of memory") as raised:
        trainer.next_word(timeout_s=20)
    assert raised.value.code is FailureCode.HOST_OUT_OF_MEMORY


def test_a_child_shot_while_memory_is_plenty_just_died(stage: Stage) -> None:
    trainer = stage.start("os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(TrainerDiedError, match=r"killed by SIGKILL\.") as raised:
        trainer.next_word(timeout_s=20)
    assert raised.value.code is FailureCode.TRAINER_DIED


def test_no_group_and_no_guard_is_left_after_a_stop(stage: Stage) -> None:
    trainer = stage.start("time.sleep(300)")
    assert trainer._tree is not None
    guard, folders = trainer._tree._guard, trainer._tree._cgroup.folders
    assert guard is not None
    assert guard.poll() is None
    trainer.stop()
    assert guard.poll() is not None
    assert not any(folder.exists() for folder in folders)


def test_groups_left_empty_by_the_dead_are_removed_by_the_next(stage: Stage, group: Cgroup) -> None:
    needs(group, "cgroup.procs")
    stage.start("time.sleep(300)")
    assert not any(folder.exists() for folder in group.folders)


def test_a_group_removed_between_two_children_is_made_again(stage: Stage, group: Cgroup) -> None:
    needs(group, "cgroup.procs")
    trainer = stage.start("time.sleep(300)")
    assert trainer.kill()
    assert trainer._tree is not None
    mine = trainer._tree._cgroup
    mine.remove()
    trainer.start()
    assert trainer._process is not None
    assert mine.members() == {trainer._process.pid}


@contextmanager
def worker(stage: Stage) -> Iterator[tuple[int, int, int]]:
    """A process with a trainer: its pid, the child's and the guard's."""
    code = WORKER.format(starter=str(stage.starter), is_without_groups=stage.is_without_groups)
    with subprocess.Popen([PYTHON, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            child, guard = map(int, process.stdout.readline().split())
            yield process.pid, child, guard
        finally:
            process.kill()


@pytest.mark.usefixtures("_groups")
def test_all_of_a_killed_workers_trainer_is_gone_within_two_seconds(stage: Stage) -> None:
    stage.write("hide(NOTED); time.sleep(300)")
    with worker(stage) as (pid, child, guard):
        hidden = stage.number()
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not (is_alive(child) or is_alive(hidden)), timeout_s=2)
        wait_for(lambda: not is_alive(guard))


def test_the_real_child_dies_with_its_worker_while_a_step_holds_the_interpreter(stage: Stage) -> None:
    """Without the guard: the system does it, as the child asked it to."""
    stage.write(
        "import ctypes; from worker.training.lifeline import die_with_parent\n"
        "die_with_parent(os.getppid()); note(NOTED, 1)\n"
        "ctypes.PyDLL(None).sleep(300)"  # PyDLL keeps the interpreter's lock
    )
    stage.is_without_groups = True  # nobody would be left to remove them
    with worker(stage) as (pid, child, guard):
        stage.number()
        os.kill(guard, signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not is_alive(child), timeout_s=2)


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_the_child_outlives_the_thread_that_asked_for_it(stage: Stage) -> None:
    stage.write(
        "from worker.training.lifeline import die_with_parent\n"
        "die_with_parent(os.getppid()); note(NOTED, 1); time.sleep(300)"
    )
    trainer = Trainer(grace_s=0.5, worker="test")
    stage.trainers.append(trainer)
    thread = threading.Thread(target=trainer.start)
    thread.start()
    thread.join()
    stage.number()
    time.sleep(0.3)
    assert trainer._process is not None
    assert trainer._process.poll() is None

"""The real child process: warm from job to job, ended without a trace, its death told by name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.tiny import write_examples
from tests.worker.desk import wait_for
from worker.trainer import Trainer, TrainerDiedError
from worker.training.words import (
    Adapter,
    CheckpointReady,
    Failed,
    Finished,
    Log,
    Started,
    StepDone,
    TrainSpec,
    TrainWord,
    Working,
)


@pytest.fixture
def spec(models_file: Path, tmp_path: Path) -> TrainSpec:
    return TrainSpec(
        job_id="j",
        attempt=1,
        base_model_dir=str(models_file.parent / "tiny"),
        training_file=str(write_examples(tmp_path / "train.jsonl", 4)),
        output_dir=str(tmp_path / "out"),
        adapter=Adapter.LORA,
        rank=2,
        n_epochs=1,
        batch_size=2,
        max_length=128,
    )


def ready(trainer: Trainer) -> psutil.Process:
    trainer.start()
    assert trainer.wait_ready(timeout_s=120)
    assert trainer._process is not None
    return psutil.Process(trainer._process.pid)


def run(trainer: Trainer, spec: TrainSpec) -> list[TrainWord]:
    trainer.send(spec)
    words: list[TrainWord] = []
    while not words or not isinstance(words[-1], Finished | Failed):
        word = trainer.next_word(timeout_s=60)
        assert word is not None
        if not isinstance(word, Working):
            words.append(word)
    return words


def test_one_child_trains_job_after_job(trainer: Trainer, spec: TrainSpec) -> None:
    child = ready(trainer)
    for number in (1, 2):
        words = run(trainer, spec.model_copy(update={"output_dir": f"{spec.output_dir}{number}"}))
        kinds = [type(word) for word in words]
        assert kinds == [Started, StepDone, StepDone, CheckpointReady, Log, Finished]
    trainer.start()
    assert ready(trainer).pid == child.pid
    assert trainer.next_word(timeout_s=0.01) is None


def test_a_job_that_fails_leaves_the_child_ready_for_the_next(trainer: Trainer, spec: TrainSpec) -> None:
    child = ready(trainer)
    [*_, word] = run(trainer, spec.model_copy(update={"base_model_dir": "/nowhere"}))
    assert isinstance(word, Failed)
    assert isinstance(run(trainer, spec)[-1], Finished)
    assert child.is_running()


def test_the_child_sees_no_address_and_no_password(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trainer: Trainer
) -> None:
    secrets = {
        "LUTHIER_DATABASE_URL": "s3cret",
        "PGPASSWORD": "s3cret",
        "AWS_SECRET_ACCESS_KEY": "s3cret",
        "HF_TOKEN": "s3cret",
        "OPENAI_API_KEY": "s3cret",
        "REDIS_URL": "s3cret",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    trainer.stop()
    environment = ready(trainer).environ()
    assert not set(secrets) & set(environment)
    assert "s3cret" not in environment.values()
    assert environment["TOKENIZERS_PARALLELISM"] == "false"
    assert environment["PATH"] == os.environ["PATH"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_a_killed_child_is_told_by_its_signal_and_another_can_start(
    number: signal.Signals, spec: TrainSpec
) -> None:
    trainer = Trainer(grace_s=1.0, worker="test")
    trainer.start()
    assert trainer._process is not None
    os.kill(trainer._process.pid, number)
    try:
        with pytest.raises(TrainerDiedError, match=f"killed by {number.name}"):
            trainer.next_word(timeout_s=20)
        assert not trainer.is_ready
        with pytest.raises(TrainerDiedError):
            trainer.send(spec)
        trainer.start()
        assert trainer._process.poll() is None
    finally:
        trainer.stop()


@pytest.fixture
def odd_trainer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[Trainer, Path]]:
    """A trainer whose child is another program: one line of Python written by the test."""
    program = tmp_path / "program.py"
    starter = tmp_path / "python"
    is_child = '[ "$3" = worker.training ]'
    python = sys.executable
    starter.write_text(f'#!/bin/sh\nif {is_child}; then exec {python} {program}; fi\nexec {python} "$@"\n')
    starter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(starter))
    trainer = Trainer(grace_s=0.5, worker="test")
    yield trainer, program
    trainer.stop()


def test_an_exit_code_is_told(odd_trainer: tuple[Trainer, Path]) -> None:
    trainer, program = odd_trainer
    program.write_text("raise SystemExit(3)")
    trainer.start()
    with pytest.raises(TrainerDiedError, match="ended with exit code 3"):
        trainer.next_word(timeout_s=20)


def test_a_real_time_signal_has_a_number_instead_of_a_name(odd_trainer: tuple[Trainer, Path]) -> None:
    trainer, program = odd_trainer
    program.write_text("import os; os.kill(os.getpid(), 40)")
    trainer.start()
    with pytest.raises(TrainerDiedError, match="killed by signal 40"):
        trainer.next_word(timeout_s=20)


def test_noise_on_the_line_is_skipped(odd_trainer: tuple[Trainer, Path]) -> None:
    trainer, program = odd_trainer
    program.write_text(
        "import time\nprint('warning: noise')\nprint('{\"word\": \"unknown\"}')\nprint('x' * 3_000_000)\n"
        'print(\'{"word": "ready", "device": "cpu"}\', flush=True)\n'
        'print(\'{"word": "log", "message": "hello"}\', flush=True)\ntime.sleep(60)'
    )
    trainer.start()
    assert trainer.wait_ready(timeout_s=20)
    word = trainer.next_word(timeout_s=20)
    assert word is not None
    assert word.word == "log"


def test_a_child_that_follows_one_that_was_ready_is_trusted_to_come_up_until_it_does_not(
    odd_trainer: tuple[Trainer, Path],
) -> None:
    trainer, program = odd_trainer
    program.write_text(
        'import time\nprint(\'{"word": "ready", "device": "cpu"}\', flush=True)\ntime.sleep(60)'
    )
    assert trainer.device is None
    trainer.start()
    assert trainer.wait_ready(timeout_s=20)
    trainer.kill()  # as a cancel does
    assert trainer.device is not None
    program.write_text("raise SystemExit(1)")
    trainer.start()
    assert trainer.device is not None
    with pytest.raises(TrainerDiedError):
        trainer.wait_ready(timeout_s=20)
    trainer.start()
    assert trainer.device is None


def test_stop_ends_a_child_that_will_not_and_all_it_started(
    odd_trainer: tuple[Trainer, Path], tmp_path: Path
) -> None:
    trainer, program = odd_trainer
    pids = tmp_path / "pids"
    program.write_text(
        "import os, signal, subprocess, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "children = [subprocess.Popen(['sleep', '300']) for _ in range(2)]\n"
        f"part = open({str(pids)!r} + '.part', 'w'); part.write(' '.join(str(c.pid) for c in children))\n"
        f"part.close(); os.rename({str(pids)!r} + '.part', {str(pids)!r})\n"
        "time.sleep(300)"
    )
    trainer.start()
    assert trainer._process is not None
    child = trainer._process.pid
    wait_for(pids.exists)
    began = time.monotonic()
    trainer.stop()
    assert time.monotonic() - began < 10
    for pid in (child, *map(int, pids.read_text().split())):
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    trainer.stop()


def test_the_child_ends_with_its_parent(tmp_path: Path) -> None:
    script = (
        "import os, sys, time; from worker.trainer import Trainer\n"
        "t = Trainer(grace_s=1, worker='test'); t.start(); print(t._process.pid, flush=True)\n"
        "t.wait_ready(timeout_s=60); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False, timeout=90)
    child = int(done.stdout)
    wait_for(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie", timeout_s=10)

"""The warm child process as its parent sees it: lines in, lines out, and an end in every case."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.tiny import write_examples
from worker.training.words import (
    TRAIN_WORD,
    CheckpointReady,
    Failed,
    Finished,
    Log,
    Ready,
    Started,
    StepDone,
    Stopped,
    TrainSpec,
    TrainWord,
    Working,
)

MakeSpec = Callable[..., TrainSpec]
Child = subprocess.Popen[bytes]


@contextmanager
def ready_child() -> Iterator[Child]:
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", "worker.training"]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as process:
        try:
            assert isinstance(hear(process), Ready)
            yield process
        finally:
            process.kill()


@pytest.fixture
def child() -> Iterator[Child]:
    """A child to be ended by the test."""
    with ready_child() as process:
        yield process


@pytest.fixture(scope="module")
def warm_child() -> Iterator[Child]:
    """A child that must survive every test that uses it."""
    with ready_child() as process:
        yield process


def say(child: Child, text: str) -> None:
    assert child.stdin is not None
    child.stdin.write(text.encode() + b"\n")
    child.stdin.flush()


def hear(child: Child) -> TrainWord:
    """The next word that is no mere sign of life."""
    assert child.stdout is not None
    while isinstance(word := TRAIN_WORD.validate_json(child.stdout.readline()), Working):
        pass
    return word


def hear_all(child: Child) -> list[TrainWord]:
    words = [hear(child)]
    while not isinstance(words[-1], Finished | Failed | Stopped):
        words.append(hear(child))
    return words


def long_spec(make_spec: MakeSpec, tmp_path: Path) -> TrainSpec:
    file = write_examples(tmp_path / "long.jsonl", 200)
    return make_spec(training_file=str(file), n_epochs=50, batch_size=1)


def test_the_child_answers_job_after_job(warm_child: Child, make_spec: MakeSpec) -> None:
    for number in range(2):
        spec = make_spec(output_dir=f"{make_spec().output_dir}-{number}")
        say(warm_child, spec.model_dump_json())
        words = hear_all(warm_child)
        assert isinstance(words[0], Started)
        assert isinstance(words[-1], Finished)


def test_an_unknown_error_becomes_a_word_without_inside_and_the_child_goes_on(
    warm_child: Child, make_spec: MakeSpec
) -> None:
    say(warm_child, make_spec(base_model_dir="/nowhere/at/all").model_dump_json())
    failed = hear(warm_child)
    assert isinstance(failed, Failed)
    assert (failed.code, failed.retryable) == ("server_error", True)
    assert "/nowhere" not in failed.model_dump_json()
    say(warm_child, make_spec().model_dump_json())
    assert isinstance(hear_all(warm_child)[-1], Finished)


def test_a_line_that_is_no_spec_is_answered_too(warm_child: Child) -> None:
    say(warm_child, "{")
    failed = hear(warm_child)
    assert isinstance(failed, Failed)
    assert failed.code == "server_error"


def test_neither_trainer_nor_engine_warns_of_a_kernel_nobody_needs() -> None:
    """bitsandbytes looks for it at import, on CPUs with AVX512-BF16."""
    code = "import worker.training.loop, worker.serving.engine, bitsandbytes.backends.cpu.ops"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert b"gemm_4bit_forward" not in done.stderr


def test_the_child_outlives_ctrl_c_which_its_parent_answers(warm_child: Child, make_spec: MakeSpec) -> None:
    warm_child.send_signal(signal.SIGINT)
    say(warm_child, make_spec().model_dump_json())
    assert isinstance(hear_all(warm_child)[-1], Finished)


def test_the_child_ends_when_its_stdin_closes_in_the_middle_of_a_job(
    child: Child, make_spec: MakeSpec, tmp_path: Path
) -> None:
    say(child, long_spec(make_spec, tmp_path).model_dump_json())
    while not isinstance(hear(child), StepDone):
        pass
    assert child.stdin is not None
    child.stdin.close()
    assert child.wait(timeout=10) == 0


def test_sigterm_ends_a_job_with_a_checkpoint_and_the_child_takes_the_next(
    warm_child: Child, make_spec: MakeSpec, tmp_path: Path
) -> None:
    say(warm_child, long_spec(make_spec, tmp_path).model_dump_json())
    words = [hear(warm_child)]
    while not isinstance(words[-1], StepDone):
        words.append(hear(warm_child))
    warm_child.terminate()
    *_, done, kept, stopped = words + hear_all(warm_child)
    assert isinstance(kept, CheckpointReady)
    assert isinstance(done, StepDone)
    assert stopped == Stopped(step=kept.metrics.step)
    assert done.metrics == kept.metrics
    say(warm_child, make_spec().model_dump_json())
    assert isinstance(hear_all(warm_child)[-1], Finished)


def test_sigterm_in_setup_ends_the_job_without_a_checkpoint(
    warm_child: Child, make_spec: MakeSpec, tmp_path: Path
) -> None:
    file = write_examples(tmp_path / "huge.jsonl", 20_000)
    say(warm_child, make_spec(training_file=str(file)).model_dump_json())
    assert warm_child.stdout is not None
    assert isinstance(TRAIN_WORD.validate_json(warm_child.stdout.readline()), Working)
    warm_child.terminate()
    assert hear(warm_child) == Stopped(step=0)
    assert not (tmp_path / "attempt").exists()


def test_sigterm_ends_an_idle_child(child: Child) -> None:
    child.terminate()
    assert child.wait(timeout=10) == 0


def test_a_child_asked_to_stop_when_its_job_is_over_ends(child: Child, make_spec: MakeSpec) -> None:
    say(child, make_spec(n_epochs=1, batch_size=20).model_dump_json())  # a single step
    while not isinstance(hear(child), StepDone):
        pass
    child.terminate()
    assert isinstance(hear(child), CheckpointReady)
    agreed = hear(child)
    assert isinstance(agreed, Log)
    assert "serving engine agrees" in agreed.message
    assert isinstance(hear(child), Finished)
    assert child.wait(timeout=10) == 0


def test_the_child_ends_when_its_parent_is_killed_though_another_process_holds_its_stdin_open() -> None:
    read_end, write_end = os.pipe()  # the write end stays open here, as in a forked sibling
    out_end, child_out = os.pipe()
    start_child = "import subprocess as s, sys; s.Popen([sys.executable, '-m', 'worker.training']).wait()"
    parent = subprocess.Popen(
        [sys.executable, "-c", start_child], stdin=read_end, stdout=child_out, stderr=subprocess.DEVNULL
    )
    os.close(read_end)
    os.close(child_out)
    with os.fdopen(out_end, "rb") as words:
        assert isinstance(TRAIN_WORD.validate_json(words.readline()), Ready)
        parent.kill()
        parent.wait()
        started = time.monotonic()
        assert words.read() == b""  # end of file: the child is gone
        assert time.monotonic() - started < 10
    os.close(write_end)

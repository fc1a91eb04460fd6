"""Where memory ends, smaller parts give the same result; else the user learns what helps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from app.core import memory
from tests.tiny import write_examples
from tests.training.conftest import told
from tests.training.test_resume import content, folders, metrics, run_until
from worker.chat_template import TokenizedExample
from worker.training.errors import failure_of
from worker.training.loop import train
from worker.training.loss import Sums
from worker.training.model import TunedModel, WarmBase
from worker.training.words import Adapter, Failed, Finished, Log, TrainSpec, TrainWord

MakeSpec = Callable[..., TrainSpec]


class Device:
    """The device's memory, as far as a forward pass notices: `room` tokens."""

    def __init__(self, room: int | None) -> None:
        self.room = room
        self.taken_at: int | None = None  # the pass in which a neighbour has all memory
        self.passes: list[int] = []  # tokens of each that fitted


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device(None)
    sums = TunedModel.sums

    def limited(tuned: TunedModel, examples: Sequence[TokenizedExample]) -> Sums:
        tokens = sum(tuned.flat(examples).lengths)
        result = sums(tuned, examples)  # random numbers are drawn, memory is taken: then there is no more
        if device.taken_at == len(device.passes) or (device.room is not None and tokens > device.room):
            device.taken_at = None
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        device.passes.append(tokens)
        return result

    monkeypatch.setattr(TunedModel, "sums", limited)
    return device


def logs(words: Sequence[TrainWord]) -> list[Log]:
    return [word for word in words if isinstance(word, Log)]


@pytest.mark.parametrize("adapter", list(Adapter))
def test_a_step_without_room_is_done_in_smaller_parts_with_the_same_result(
    make_spec: MakeSpec, warm: WarmBase, device: Device, adapter: Adapter
) -> None:
    spec = make_spec(adapter=adapter, learning_rate=1e-3)
    roomy = told(train(spec, warm))
    device.room = max(device.passes) // 2
    device.passes.clear()
    tight = told(train(spec.model_copy(update={"output_dir": spec.output_dir + "-tight"}), warm))
    assert isinstance(tight[-1], Finished)
    assert max(device.passes) <= device.room
    assert [word.level for word in logs(tight)] == ["warn"]
    assert "step 1" in logs(tight)[0].message
    assert "halved 1 of at most 4 times" in logs(tight)[0].message
    for one, other in zip(metrics(tight), metrics(roomy), strict=True):
        assert one.train_loss == pytest.approx(other.train_loss, rel=1e-5)
        assert one.train_mean_token_accuracy == other.train_mean_token_accuracy


def test_after_a_cut_the_run_equals_one_that_never_had_more_room(
    make_spec: MakeSpec, warm: WarmBase, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, dropout included: the failed pass leaves no gradient and takes no random number."""
    device.room = 100
    cut = told(train(make_spec(dropout=0.3), warm))
    (said,) = logs(cut)
    tokens = int(said.message.partition("parts of ")[2].split()[0])
    monkeypatch.setitem(memory.MOST_TOKENS, "cpu", tokens)
    small = told(train(make_spec(dropout=0.3, output_dir=make_spec().output_dir + "-small"), warm))
    assert logs(small) == []
    assert metrics(cut) == metrics(small)
    assert content(folders(cut)[0]) == content(folders(small)[0])


def test_parts_that_were_done_before_memory_ran_out_do_not_count_twice(
    make_spec: MakeSpec, warm: WarmBase, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(memory.MOST_TOKENS, "cpu", 120)
    spec = make_spec(learning_rate=1e-3)
    roomy = told(train(spec, warm))
    device.passes.clear()
    device.taken_at = 1
    cut = told(train(spec.model_copy(update={"output_dir": spec.output_dir + "-cut"}), warm))
    assert len(logs(cut)) == 1
    for one, other in zip(metrics(cut), metrics(roomy), strict=True):
        assert one.train_loss == pytest.approx(other.train_loss, rel=1e-5)


def test_a_resumed_run_remembers_the_cut(make_spec: MakeSpec, warm: WarmBase, device: Device) -> None:
    device.room = 100
    whole = told(train(make_spec(), warm))
    first = run_until(make_spec(output_dir=make_spec().output_dir + "-1"), warm, step=4)
    changes = {"output_dir": make_spec().output_dir + "-2", "resume_from": tuple(folders(first))}
    second = told(train(make_spec(**changes), warm))
    assert len(logs(first)) == 1
    assert logs(second) == []
    assert metrics(first) + metrics(second) == metrics(whole)
    assert content(folders(second)[0]) == content(folders(whole)[0])


def test_when_no_part_is_small_enough_the_job_fails_with_advice(
    make_spec: MakeSpec, warm: WarmBase, device: Device
) -> None:
    device.room = 1
    *said, failed = told(train(make_spec(batch_size=11), warm))
    cuts = [word.message for word in said if isinstance(word, Log)]
    assert 1 <= len(cuts) <= 4
    assert isinstance(failed, Failed)
    assert (failed.code, failed.retryable) == ("out_of_memory", False)
    assert "Lower batch_size or luthier.max_length" in failed.message
    device.room = None
    assert isinstance(told(train(make_spec(), warm))[-1], Finished)


def test_room_is_not_looked_for_more_than_four_times(
    make_spec: MakeSpec, warm: WarmBase, device: Device, tmp_path: Path
) -> None:
    spec = make_spec(batch_size=80, training_file=str(write_examples(tmp_path / "many.jsonl", 80)))
    device.room = 1
    *said, failed = told(train(spec, warm))
    assert [word.message.partition("halved ")[2][0] for word in logs(said)] == ["1", "2", "3", "4"]
    assert isinstance(failed, Failed)


@pytest.mark.parametrize(
    ("error", "code", "retryable"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "out_of_memory", False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "out_of_memory", False),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't"),
            "host_out_of_memory",
            True,
        ),
        (MemoryError(), "host_out_of_memory", True),
        (OSError(12, "Cannot allocate memory"), "host_out_of_memory", True),
    ],
)
def test_whose_memory_ran_out_is_named(error: Exception, code: str, retryable: bool) -> None:
    failed = failure_of(error)
    assert failed is not None
    assert (failed.code, failed.retryable) == (code, retryable)


def test_other_errors_of_the_device_are_not_taken_for_a_lack_of_memory() -> None:
    assert failure_of(RuntimeError("CUDA error: device-side assert triggered")) is None

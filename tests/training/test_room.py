"""A pass is as large as the machine's memory allows, and the result is the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from app.core import memory
from tests.tiny import write_examples
from tests.training.conftest import told
from tests.training.test_resume import content, folders, metrics, run_until
from worker.training import room
from worker.training.loop import train
from worker.training.model import TunedModel, WarmBase
from worker.training.words import Finished, TrainSpec

MakeSpec = Callable[..., TrainSpec]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each pass, in order; Python and torch weigh nothing, so that a tiny model's job is tight."""
    monkeypatch.setitem(memory.PROCESS_BYTES, "cpu", 0)
    seen: list[int] = []
    really = TunedModel.flat

    def flat(self: TunedModel, examples):  # type: ignore[no-untyped-def]
        batch = really(self, examples)
        seen.append(len(batch.ids))
        return batch

    monkeypatch.setattr(TunedModel, "flat", flat)
    return seen


def test_on_a_small_machine_passes_are_smaller_and_losses_the_same(
    make_spec: MakeSpec, warm: WarmBase, passes: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spec = make_spec(training_file=str(write_examples(tmp_path / "many.jsonl", 64)), batch_size=32)
    roomy = told(train(spec, warm))
    largest = max(passes)
    passes.clear()
    monkeypatch.setattr(room, "memory_of", lambda _device: 5_000_000)
    tight = told(train(spec.model_copy(update={"output_dir": spec.output_dir + "-tight"}), warm))
    assert isinstance(tight[-1], Finished)
    assert max(passes) < largest / 2
    for one, other in zip(metrics(tight), metrics(roomy), strict=True):
        assert one.train_loss == pytest.approx(other.train_loss, rel=1e-5)


def test_an_attempt_on_a_larger_machine_goes_on_with_the_passes_it_had(
    make_spec: MakeSpec, warm: WarmBase, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, as on one machine."""
    monkeypatch.setitem(memory.MOST_TOKENS, "cpu", 100)
    whole = told(train(make_spec(), warm))
    first = run_until(make_spec(output_dir=make_spec().output_dir + "-1"), warm, step=4)
    monkeypatch.setitem(memory.MOST_TOKENS, "cpu", 3072)
    changes = {"output_dir": make_spec().output_dir + "-2", "resume_from": tuple(folders(first))}
    second = told(train(make_spec(**changes), warm))
    assert metrics(first) + metrics(second) == metrics(whole)
    assert content(folders(second)[0]) == content(folders(whole)[0])

"""A run with held-out examples ends well only when it is better on them than what it began from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import write_examples
from tests.training.conftest import CPU, told
from tests.training.test_resume import content, folders, metrics, run_until
from worker.base_model import load_base_model, load_tokenizer
from worker.chat_template import ChatTemplate, TokenizedExample
from worker.training.loop import train
from worker.training.loss import Sums
from worker.training.model import TunedModel, WarmBase
from worker.training.words import (
    Adapter,
    Baseline,
    Failed,
    Finished,
    Log,
    Started,
    StepDone,
    TrainSpec,
    TrainWord,
)

MakeSpec = Callable[..., TrainSpec]


@pytest.fixture
def make_worse(make_spec: MakeSpec, warm: WarmBase, tmp_path: Path) -> MakeSpec:
    """Runs that go on from a model tuned to say yes, learn to say no, and are held to saying yes."""
    yes = write_examples(tmp_path / "yes.jsonl", 20)
    no = write_examples(tmp_path / "no.jsonl", 11, answer="0123456789 0123456789")
    pace = {"adapter": Adapter.FULL, "learning_rate": 3e-3}
    start = folders(told(train(make_spec(output_dir=str(tmp_path / "start"), n_epochs=6, **pace), warm)))[0]

    def make(name: str, **changes: object) -> TrainSpec:
        fields: dict[str, object] = pace | {
            "start_from_dir": start,
            "training_file": str(no),
            "validation_file": str(yes),
            "output_dir": str(tmp_path / name),
        }
        return make_spec(**(fields | changes))

    return make


def baselines(words: Sequence[TrainWord]) -> list[Baseline]:
    return [word for word in words if isinstance(word, Baseline)]


@pytest.mark.parametrize("adapter", [Adapter.LORA, Adapter.FULL])
def test_the_loss_to_beat_is_the_base_models_mean_over_all_held_out_tokens(
    make_spec: MakeSpec, warm: WarmBase, tmp_path: Path, tiny_dir: Path, adapter: Adapter
) -> None:
    file = write_examples(tmp_path / "valid.jsonl", 20, answer="The answer is no.")
    words = told(train(make_spec(adapter=adapter, validation_file=str(file)), warm))
    assert [type(word) for word in words[:3]] == [Started, Baseline, StepDone]
    plain = load_base_model(tiny_dir, quantize_4bit=False, device=CPU, dtype=torch.float32)
    template = ChatTemplate(load_tokenizer(tiny_dir))
    total, count = 0.0, 0
    for number in range(20):
        question = f"Where is my order {number}?" + " Thank you." * (number % 4)
        example = template.encode_example(
            [{"role": "user", "content": question}, {"role": "assistant", "content": "The answer is no."}]
        )
        with torch.no_grad():
            logs = plain(input_ids=torch.tensor([example.ids])).logits[0].double().log_softmax(-1)
        at = [place for place in range(1, len(example.ids)) if example.is_label[place]]
        total -= sum(logs[place - 1, example.ids[place]].item() for place in at)
        count += len(at)
    (said,) = baselines(words)
    assert said.metrics.step == 0
    assert said.metrics.full_valid_loss == pytest.approx(total / count, rel=1e-5)
    last = words[-1]
    assert isinstance(last, Finished)
    assert last.full_valid_loss == metrics(words)[-1].full_valid_loss
    assert last.full_valid_loss is not None
    assert last.full_valid_loss < total / count


def test_a_run_that_is_worse_than_what_it_began_from_fails_with_both_losses(
    make_worse: MakeSpec, warm: WarmBase
) -> None:
    words = told(train(make_worse("worse"), warm))
    failed, before = words[-1], baselines(words)[0].metrics.full_valid_loss
    after = metrics(words)[-1].full_valid_loss
    assert before is not None
    assert after is not None
    assert before < after < 5.0  # both of the tuned model: the bare base is at 6
    assert isinstance(failed, Failed)
    assert (failed.code, failed.param, failed.retryable) == ("no_improvement", "validation_file", False)
    assert f"its loss is {after:.4f}, before training it was {before:.4f}" in failed.message
    assert "luthier.require_improvement" in failed.message
    assert len(folders(words)) == 2


def test_a_run_that_need_not_be_better_ends_well_and_says_both_losses(
    make_worse: MakeSpec, warm: WarmBase
) -> None:
    words = told(train(make_worse("kept", require_improvement=False), warm))
    last = words[-1]
    assert isinstance(last, Finished)
    assert last.full_valid_loss == metrics(words)[-1].full_valid_loss
    assert len(baselines(words)) == 1


def test_without_held_out_examples_nothing_is_measured_and_nothing_compared(
    make_worse: MakeSpec, warm: WarmBase
) -> None:
    words = told(train(make_worse("blind", validation_file=None), warm))
    assert isinstance(words[-1], Finished)
    assert words[-1].full_valid_loss is None
    assert baselines(words) == []


@pytest.mark.parametrize("step", [2, 6])
def test_a_resumed_run_is_held_to_the_loss_measured_before_its_first_step(
    make_worse: MakeSpec, warm: WarmBase, step: int
) -> None:
    """Also where all steps were done, and only the last word was never heard."""
    whole = told(train(make_worse("whole"), warm))
    first = run_until(make_worse("first"), warm, step=step)
    second = told(train(make_worse("second", resume_from=tuple(folders(first))), warm))
    assert baselines(first) == baselines(whole)
    assert baselines(second) == []
    assert second[-1] == whole[-1]
    if step < 6:
        assert content(folders(second)[0]) == content(folders(whole)[0])


def test_measuring_before_the_first_step_finds_room_where_training_would(
    make_spec: MakeSpec, warm: WarmBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_examples(tmp_path / "valid.jsonl", 20)
    roomy = told(train(make_spec(validation_file=str(file)), warm))
    real: Any = TunedModel.sums

    def limited(tuned: TunedModel, examples: Sequence[TokenizedExample]) -> Sums:
        if sum(tuned.flat(examples).lengths) > 200:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        sums: Sums = real(tuned, examples)
        return sums

    monkeypatch.setattr(TunedModel, "sums", limited)
    tight = told(train(make_spec(validation_file=str(file), output_dir=str(tmp_path / "tight")), warm))
    assert isinstance(tight[-1], Finished)
    assert not [word for word in tight if isinstance(word, Log)]
    assert baselines(tight)[0].metrics.full_valid_loss == pytest.approx(
        baselines(roomy)[0].metrics.full_valid_loss, rel=1e-6
    )

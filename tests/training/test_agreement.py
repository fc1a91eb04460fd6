"""No job succeeds whose model the serving engine would answer for otherwise than its trainer."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import CHAT_TEMPLATE, write_examples
from tests.training.conftest import CPU, told
from worker.serving.scoring import AnswerScorer
from worker.training.loop import train
from worker.training.model import WarmBase
from worker.training.words import CheckpointReady, Failed, Finished, Log, StepDone, TrainSpec, TrainWord

MakeSpec = Callable[..., TrainSpec]
Rows = list[tuple[list[int], list[int]]]


def agreed(words: list[TrainWord]) -> list[str]:
    return [word.message for word in words if isinstance(word, Log) and "engine agrees" in word.message]


def nats(words: list[TrainWord]) -> float:
    (message,) = agreed(words)
    found = re.search(r"probabilities (\S+) nats", message)
    assert found is not None
    return float(found[1])


@pytest.mark.parametrize("adapter", ["lora", "qlora", "full"])
def test_a_job_ends_after_the_engine_gave_its_answers_the_same_log_probabilities(
    make_spec: MakeSpec, warm: WarmBase, tmp_path: Path, adapter: str
) -> None:
    held_out = str(write_examples(tmp_path / "held-out.jsonl", 6))
    spec = make_spec(adapter=adapter, validation_file=held_out)
    words = []
    for word in train(spec, warm, server=AnswerScorer):
        words.append(word)
        if isinstance(word, CheckpointReady):
            shutil.move(word.dir, tmp_path / "storage")  # as its parent does
    assert isinstance(words[-1], Finished)
    assert list(Path(spec.output_dir).iterdir()) == []
    assert "held-out" in agreed(words)[0]
    assert nats(words) < 1e-5


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_engine_takes_the_scale_of_the_adapter_also_where_it_goes_on_in_a_wider_shape(
    make_spec: MakeSpec, warm: WarmBase, tmp_path: Path, use_rslora: bool
) -> None:
    fields: dict[str, Any] = {"adapter": "lora", "learning_rate": 0.1, "alpha": 12.0}
    words = told(train(make_spec(use_rslora=True, **fields), warm, server=AnswerScorer))
    assert nats(words) < 1e-5
    start = [word.dir for word in words if isinstance(word, CheckpointReady)][-1]
    changes = {"start_from_dir": start, "output_dir": str(tmp_path / "more"), "rank": 7}
    spec = make_spec(**(fields | changes), use_rslora=use_rslora)
    assert nats(told(train(spec, warm, server=AnswerScorer))) < 1e-5


def test_rounded_to_bfloat16_both_sides_still_agree(make_spec: MakeSpec) -> None:
    words = told(train(make_spec(), WarmBase(CPU, torch.bfloat16), server=AnswerScorer))
    assert isinstance(words[-1], Finished)
    assert 0 < nats(words) < 0.05


def test_long_conversations_are_compared_too(make_spec: MakeSpec, warm: WarmBase, tmp_path: Path) -> None:
    """Several parts of a prompt, answers of unequal length, turns after the first, tools."""
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    turns = [
        {"role": "system", "content": "Thank you. " * 60},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "\nyes", "weight": 0},
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "\n\nThe answer is 0123456789."},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "no"},
    ]
    short = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "yes"}]
    lines = [json.dumps({"messages": turns, "tools": [tool]}), *[json.dumps({"messages": short})] * 10]
    file = tmp_path / "long.jsonl"
    file.write_text("\n".join(lines))
    spec = make_spec(training_file=str(file), n_epochs=40, batch_size=11)
    words = told(train(spec, warm, server=AnswerScorer))
    assert nats(words) < 1e-5
    assert "4 training answer(s)" in agreed(words)[0]


def test_nothing_the_comparison_does_can_be_seen_in_what_was_trained(
    make_spec: MakeSpec, warm: WarmBase
) -> None:
    """Nor in the next job over the same base model, nor in one that only had its end left to do."""
    compared = told(train(make_spec(), warm, server=AnswerScorer))
    plain = told(train(make_spec(output_dir=make_spec().output_dir + "-2"), warm))
    ends = [[Path(w.dir) for w in words if isinstance(w, CheckpointReady)] for words in (compared, plain)]
    for one, other in zip(*ends, strict=True):
        for file in ("adapter_model.safetensors", "training_record.json"):
            assert (one / file).read_bytes() == (other / file).read_bytes()
    again = told(train(make_spec(resume_from=(str(ends[0][-1]),)), warm, server=AnswerScorer))
    assert agreed(again) == agreed(compared)
    assert not any(isinstance(word, StepDone) for word in again)


class _WithoutAdapter(AnswerScorer):
    def log_probabilities(self, adapter_dir: Path | None, rows: Any) -> list[list[float]]:
        return super().log_probabilities(None, rows)


class _Endless(AnswerScorer):
    def ends_answer(self, token_id: int) -> bool:
        return False


def _other_template(model: Any, tokenizer: Any, _template: str | None) -> AnswerScorer:
    return AnswerScorer(model, tokenizer, CHAT_TEMPLATE.replace("helpful", "helpless"))


def _sliding(model: Any, tokenizer: Any, template: str | None) -> AnswerScorer:
    raise ValueError("sliding windows cannot be batched here")


@pytest.mark.parametrize(
    ("server", "why", "steps"),
    [
        (_WithoutAdapter, "nats off", 6),
        (_Endless, "the token by which", 0),
        (_other_template, "other tokens", 0),
        (_sliding, "sliding windows", 0),
    ],
)
def test_a_job_whose_engine_would_answer_otherwise_fails_and_as_early_as_can_be(
    make_spec: MakeSpec, warm: WarmBase, server: Any, why: str, steps: int
) -> None:
    words = told(train(make_spec(), warm, server=server))
    failed = words[-1]
    assert isinstance(failed, Failed)
    assert failed.code == "serving_mismatch"
    assert not failed.retryable
    assert why in failed.message
    assert sum(isinstance(word, StepDone) for word in words) == steps
    again = make_spec(output_dir=make_spec().output_dir + "-2")
    assert isinstance(told(train(again, warm, server=AnswerScorer))[-1], Finished)

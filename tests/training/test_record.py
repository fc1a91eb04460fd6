"""What stands beside a checkpoint, and which weights never become one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import write_examples
from tests.training.conftest import told
from worker.training.loop import train
from worker.training.model import WarmBase
from worker.training.words import CheckpointReady, Failed, TrainSpec, TrainWord


def checkpoints(words: list[TrainWord]) -> list[CheckpointReady]:
    return [word for word in words if isinstance(word, CheckpointReady)]


def test_a_record_beside_each_checkpoint_says_how_to_make_it_again(
    make_spec: Callable[..., TrainSpec], warm: WarmBase, tmp_path: Path
) -> None:
    spec = make_spec(checkpoint_interval=2, validation_file=str(write_examples(tmp_path / "v.jsonl", 3)))
    first, *_, last = checkpoints(told(train(spec, warm)))
    records = [json.loads((Path(word.dir) / "training_record.json").read_text()) for word in (first, last)]
    assert [record["metrics"]["step"] for record in records] == [2, 6]
    assert records[1]["metrics"]["full_valid_loss"] == last.metrics.full_valid_loss
    weights = Path(spec.base_model_dir) / "model.safetensors"
    assert records[0]["base_model_sha256"]["model.safetensors"] == (
        hashlib.sha256(weights.read_bytes()).hexdigest()
    )
    numbers = records[0]["hyperparameters"]
    assert (numbers["rank"], numbers["learning_rate"], numbers["seed"]) == (4, 1e-2, 0)
    assert records[0]["device"] == {
        "type": "cpu",
        "name": torch.backends.cpu.get_cpu_capability(),
        "dtype": "float32",
    }
    assert records[0]["versions"]["torch"] == torch.__version__
    tensors = load_file(Path(first.dir) / "adapter_model.safetensors")
    assert records[0]["trained_parameters"] == sum(tensor.numel() for tensor in tensors.values())
    file = write_examples(tmp_path / "other.jsonl", 11, answer="No.")
    other = make_spec(training_file=str(file), output_dir=spec.output_dir + "-2")
    differs = json.loads(
        (Path(checkpoints(told(train(other, warm)))[0].dir) / "training_record.json").read_text()
    )
    key = "training_examples_sha256"
    assert records[0][key] == records[1][key] != differs[key]
    assert str(tmp_path) not in json.dumps(records)


@pytest.mark.parametrize(
    ("broken", "cure"), [(float("nan"), "Lower"), (0.0, "Raise")], ids=["diverged", "zero"]
)
def test_weights_that_are_of_no_use_never_become_a_checkpoint(
    make_spec: Callable[..., TrainSpec],
    warm: WarmBase,
    monkeypatch: pytest.MonkeyPatch,
    broken: float,
    cure: str,
) -> None:
    def step(optimizer: torch.optim.AdamW) -> None:
        for weight in optimizer.param_groups[0]["params"]:
            weight.data.mul_(broken)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    words = told(train(make_spec(batch_size=11, n_epochs=1), warm))
    failed = words[-1]
    assert isinstance(failed, Failed)
    assert failed.code == "non_finite_adapter"
    assert cure in failed.message
    assert not failed.retryable
    assert checkpoints(words) == []

"""What is trained is what was asked for; in a wider shape a tuned model goes on as exactly what it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from tests.training.conftest import CPU, told
from tests.training.test_resume import content, folders, metrics, run_until
from worker.base_model import load_base_model
from worker.training.errors import TrainingError
from worker.training.loop import train
from worker.training.model import TunedModel, WarmBase, tuned_model
from worker.training.shape import check_count
from worker.training.words import Adapter, Failed, Finished, TrainSpec

# peft 0.21 asks transformers 5.23 for an attribute under its old name
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
MakeSpec = Callable[..., TrainSpec]
IDS = torch.arange(2, 34)[None]
# Of the tiny model: q 64+64, k and v 64+32 each, o 64+64, gate, up and down 64+128 each; two blocks.
ALL, Q_AND_V = 2 * (128 + 2 * 96 + 128 + 3 * 192), 2 * (128 + 96)


@pytest.fixture
def start(make_spec: MakeSpec, warm: WarmBase, tmp_path: Path) -> str:
    """An adapter of rank 4 over two of seven layers, trained far from zero."""
    changes = {"target_modules": ("q_proj", "v_proj"), "learning_rate": 0.1, "alpha": 12.0}
    return folders(told(train(make_spec(output_dir=str(tmp_path / "start"), **changes), warm)))[0]


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def in_training(tuned: TunedModel) -> Tensor:
    tuned.model.train(False)
    tuned.model.set_attn_implementation("sdpa")
    try:
        return logits(tuned.model)
    finally:
        tuned.model.set_attn_implementation("luthier_segmented")


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({"rank": 4}, 4 * ALL),
        ({"rank": 7, "target_modules": ("q_proj", "v_proj")}, 7 * Q_AND_V),
        ({"rank": 3, "target_modules": ("self_attn.q_proj", "mlp.down_proj")}, 3 * 2 * (128 + 192)),
        ({"adapter": Adapter.LORA}, 4 * ALL),
    ],
)
def test_as_many_parameters_are_trained_as_rank_and_layers_make(
    make_spec: MakeSpec, warm: WarmBase, changes: dict[str, object], count: int
) -> None:
    with tuned_model(make_spec(**changes), warm) as tuned:
        assert sum(weight.numel() for weight in tuned.parameters) == count


def test_another_number_of_parameters_than_asked_for_is_refused() -> None:
    weights = [torch.nn.Parameter(torch.zeros(3, 4))]
    check_count(weights, 12)
    with pytest.raises(TrainingError, match=r"12 parameters would be trained, but .* ask for 13") as caught:
        check_count(weights, 13)
    assert (caught.value.word.code, caught.value.word.retryable) == ("wrong_parameters", False)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ("q_proj", "v_proj"), "alpha": 12.0},
        {"target_modules": ("v_proj", "q_proj"), "rank": 9, "alpha": 27.0},
        {"rank": 6, "alpha": 5.0},
        {"rank": 6, "use_rslora": True},
    ],
    ids=["the same shape", "a higher rank", "more layers, another scale", "scaled by the root of the rank"],
)
def test_a_model_goes_on_as_exactly_what_it_was(
    make_spec: MakeSpec, warm: WarmBase, tiny_dir: Path, start: str, changes: dict[str, object]
) -> None:
    plain = load_base_model(tiny_dir, quantize_4bit=False, device=CPU, dtype=torch.float32)
    bare = logits(plain)
    before = logits(PeftModel.from_pretrained(plain, start).train(False))
    spec = make_spec(adapter=Adapter.LORA, start_from_dir=start, **changes)
    with tuned_model(spec, warm) as tuned:
        torch.testing.assert_close(in_training(tuned), before, rtol=1e-5, atol=1e-6)
    assert (before - bare).abs().max() > 0.01


def test_a_run_in_a_wider_shape_trains_all_of_it_and_resumes_to_the_last_bit(
    make_spec: MakeSpec, warm: WarmBase, tmp_path: Path, start: str
) -> None:
    def make(name: str, **changes: object) -> TrainSpec:
        return make_spec(start_from_dir=start, rank=6, output_dir=str(tmp_path / name), **changes)

    whole = told(train(make("whole"), warm))
    assert isinstance(whole[-1], Finished)
    with tuned_model(make("none"), warm, weights_dir=Path(folders(whole)[0])) as tuned:
        ups = [p for n, p in tuned.model.named_parameters() if ".lora_B." in n]
        assert all(bool(up.abs().amax(0).gt(0).all()) for up in ups)
    first = run_until(make("first"), warm, step=2)
    second = told(train(make("second", resume_from=tuple(folders(first))), warm))
    assert metrics(first) + metrics(second) == metrics(whole)
    assert content(folders(second)[0]) == content(folders(whole)[0])


@pytest.mark.parametrize(
    ("changes", "option"),
    [({"rank": 3}, "rank"), ({"target_modules": ("v_proj", "k_proj")}, "target_modules")],
)
def test_a_shape_that_would_not_hold_the_tuned_model_is_refused(
    make_spec: MakeSpec, warm: WarmBase, start: str, changes: dict[str, object], option: str
) -> None:
    failed = told(train(make_spec(start_from_dir=start, **changes), warm))[-1]
    assert isinstance(failed, Failed)
    assert (failed.code, failed.param) == ("invalid_value", f"luthier.{option}")
    assert "would not fit in" in failed.message

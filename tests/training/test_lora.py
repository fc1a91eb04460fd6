"""LoRA layers with products of our own must be peft's layers in everything but speed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from tests.training.conftest import CPU
from worker.base_model import load_base_model
from worker.training.lora import speed_up

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
Made = tuple[Any, list[torch.nn.Parameter]]


@pytest.fixture
def make(tiny_dir: Path) -> Callable[..., Made]:
    def make(*, quantize_4bit: bool = False, dtype: torch.dtype = torch.float32, **changes: Any) -> Made:
        base = load_base_model(tiny_dir, quantize_4bit=quantize_4bit, device=CPU, dtype=dtype)
        fields: dict[str, Any] = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear"}
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **(fields | changes)))
        factors = [weight for weight in model.parameters() if weight.requires_grad]
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for factor in factors:
                factor += torch.randn(factor.shape, generator=generator) * 0.05
        return model.train(), factors

    return make


def logits_and_gradients(made: Made, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    model, factors = made
    ids = torch.arange(2, 34).reshape(2, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
        logits = model(input_ids=ids).logits.float()
    for factor in factors:
        factor.grad = None
    logits.log_softmax(-1)[..., :7].sum().backward()
    return logits.detach(), torch.cat([factor.grad.float().flatten() for factor in factors])


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["up_proj"], ["k_proj", "o_proj"]])
@pytest.mark.parametrize("quantize_4bit", [False, True], ids=["full precision", "NF4"])
def test_outputs_and_gradients_are_those_of_peft(
    make: Callable[..., Made], targets: Any, quantize_4bit: bool
) -> None:
    made = make(target_modules=targets, quantize_4bit=quantize_4bit)
    logits, gradients = logits_and_gradients(made)
    layers = sum(hasattr(module, "lora_A") for module in made[0].modules())
    assert speed_up(made[0]) == layers > 0
    fast_logits, fast_gradients = logits_and_gradients(made)
    torch.testing.assert_close(fast_logits, logits, rtol=1e-5, atol=1e-5)
    assert torch.cosine_similarity(fast_gradients, gradients, dim=0) > 0.999999
    torch.testing.assert_close(fast_gradients, gradients, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("quantize_4bit", [False, True], ids=["full precision", "NF4"])
def test_in_bfloat16_they_are_no_further_from_the_truth_than_peft(
    make: Callable[..., Made], quantize_4bit: bool
) -> None:
    _, truth = logits_and_gradients(make(quantize_4bit=quantize_4bit))
    made = make(quantize_4bit=quantize_4bit, dtype=torch.bfloat16)
    _, gradients = logits_and_gradients(made, torch.bfloat16)
    speed_up(made[0])
    _, fast_gradients = logits_and_gradients(made, torch.bfloat16)
    assert (fast_gradients - truth).norm() < 1.1 * (gradients - truth).norm()


def test_layers_of_one_input_that_get_another_one_each_still_compute_their_own(
    make: Callable[..., Made],
) -> None:
    model, _ = make()
    attention = next(module for module in model.modules() if hasattr(module, "q_proj"))
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    inputs = [torch.randn(3, 64, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    expected = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
    speed_up(model)
    for layer, x, y in [
        *zip(layers, inputs, expected, strict=True),
        (layers[0], inputs[1], layers[0](inputs[1])),
    ]:
        torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("changes", [{"lora_dropout": 0.1}, {"use_dora": True}], ids=["dropout", "DoRA"])
def test_layers_that_do_more_than_lora_are_left_to_peft(
    make: Callable[..., Made], changes: dict[str, Any]
) -> None:
    made = make(**changes)
    assert speed_up(made[0]) == 0


def test_the_adapter_comes_off_again_without_a_trace(make: Callable[..., Made], tiny_dir: Path) -> None:
    model, _ = make()
    speed_up(model)
    ids = torch.arange(2, 18)[None]
    tuned = model(input_ids=ids).logits
    base = model.unload()
    plain = load_base_model(tiny_dir, quantize_4bit=False, device=CPU, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(base(input_ids=ids).logits, plain(input_ids=ids).logits)
        assert not torch.allclose(tuned, plain(input_ids=ids).logits)

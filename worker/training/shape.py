"""Which layers an adapter asks for, how many numbers that makes, and how one fits into a wider one.

Counted from the base model's layers, so that what peft made of the same request can be held against it.
Knows no data and no checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

from app.core.failures import FailureCode
from worker.training.errors import TrainingError
from worker.training.words import TrainSpec

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_ADAPTER = "default"


class Size(NamedTuple):
    """Of a linear layer."""

    inputs: int
    outputs: int


def linear_layers(base: PreTrainedModel) -> dict[str, Size]:
    """The linear layers of the blocks by name, the head left out; 4-bit ones by their unpacked size."""
    head = base.get_output_embeddings()  # type: ignore[no-untyped-call]
    found: dict[str, Size] = {}
    for name, module in base.named_modules():
        if isinstance(module, Conv1D):
            found[name] = Size(*module.weight.shape)
        elif isinstance(module, torch.nn.Linear) and module is not head:
            found[name] = Size(module.in_features, module.out_features)
    return found


def chosen_layers(base: PreTrainedModel, wanted: Sequence[str]) -> dict[str, Size]:
    """The layers that `wanted` names, all where it is empty; raises TrainingError for a name without one.

    peft would refuse such a name without a cure, or pass over it in silence beside one it knows.
    """
    layers = linear_layers(base)
    unknown = [name for name in wanted if not any(f".{layer}".endswith(f".{name}") for layer in layers)]
    if unknown:
        known = ", ".join(dict.fromkeys(layer.rpartition(".")[2] for layer in layers))
        raise TrainingError(
            FailureCode.INVALID_VALUE,
            "luthier.target_modules names no linear layer of this model's blocks: "
            f"{', '.join(map(repr, unknown))}. Its layers are {known}.",
            param="luthier.target_modules",
        )
    endings = tuple(f".{name}" for name in wanted) or ("",)
    return {name: size for name, size in layers.items() if f".{name}".endswith(endings)}


def factor_count(layers: dict[str, Size], rank: int) -> int:
    """Numbers in the factors A (rank, inputs) and B (outputs, rank) of `layers` (Hu et al. 2021, 4.1)."""
    return rank * sum(size.inputs + size.outputs for size in layers.values())


def check_count(parameters: Sequence[torch.nn.Parameter], asked: int) -> None:
    """Raises TrainingError unless exactly `asked` numbers are trained."""
    trained = sum(weight.numel() for weight in parameters)
    if trained != asked:
        raise TrainingError(
            FailureCode.WRONG_PARAMETERS,
            f"{trained} parameters would be trained, but rank and target modules ask for {asked}. "
            "Choose luthier.target_modules by name, or tell the operator.",
            param="luthier.target_modules",
        )


def put_in(peft: PeftModel, folder: Path, spec: TrainSpec) -> None:
    """Copy the adapter in `folder` into the first ranks of `peft`'s, which then computes the same.

    A rank r product is the sum over its ranks, so factors (r, I) and (O, r) are part of wider ones whose
    further columns of B are zero, as LoRA's start says. Where the scales s differ, B takes s_old / s_new.
    Raises TrainingError where the adapter does not fit in.
    """
    config = LoraConfig.from_pretrained(str(folder))
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    layers: dict[str, Any] = {
        name: module for name, module in peft.named_modules() if hasattr(module, "lora_A")
    }
    theirs = {key.rpartition(".lora_")[0] for key in tensors}
    if config.r > spec.rank:
        raise _too_narrow("rank", f"{spec.rank} is less than {config.r}, the rank")
    if not theirs <= layers.keys():
        raise _too_narrow("target_modules", "names fewer layers than those")
    scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    with torch.no_grad():
        for name in sorted(theirs):
            layer = layers[name]
            ratio = scale / layer.scaling[_ADAPTER]
            up = tensors[f"{name}.lora_B.weight"]
            layer.lora_A[_ADAPTER].weight[: config.r] = tensors[f"{name}.lora_A.weight"]
            layer.lora_B[_ADAPTER].weight[:, : config.r] = up if ratio == 1.0 else up * ratio


def _too_narrow(option: str, what: str) -> TrainingError:
    return TrainingError(
        FailureCode.INVALID_VALUE,
        f"luthier.{option} {what} of the tuned model to go on from, so that model would not fit in. "
        f"Leave luthier.{option} out, or choose more.",
        param=f"luthier.{option}",
    )

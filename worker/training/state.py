"""The tensors a run needs beside its weights to go on exactly: optimizer and random states, as safetensors.

Knows neither steps nor files of data.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from app.core.manifest import TRAINING_STATE

_OPTIMIZER = f"{TRAINING_STATE}/optimizer.safetensors"
_RANDOM = f"{TRAINING_STATE}/random.safetensors"


class RandomState:
    """Where torch's generators stand: the CPU's, and the one of a CUDA device."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors

    @classmethod
    def take(cls, device: torch.device) -> RandomState:
        """The present state."""
        tensors = {"cpu": torch.get_rng_state()}
        if device.type == "cuda":
            tensors["cuda"] = torch.cuda.get_rng_state(device)
        return cls(tensors)

    @classmethod
    def load(cls, folder: Path) -> RandomState:
        """The state kept in a checkpoint folder."""
        return cls(load_file(folder / _RANDOM))

    def save(self, folder: Path) -> None:
        """Keep it in a checkpoint folder."""
        save_file(self._tensors, folder / _RANDOM)

    def put_back(self, device: torch.device) -> None:
        """Draw from here on."""
        torch.set_rng_state(self._tensors["cpu"])
        if device.type == "cuda" and "cuda" in self._tensors:
            torch.cuda.set_rng_state(self._tensors["cuda"], device)


def save_optimizer(
    folder: Path, optimizer: torch.optim.Optimizer, parameters: Sequence[torch.nn.Parameter]
) -> None:
    """Keep what the optimizer remembers of each parameter, by its place in `parameters`."""
    tensors = {
        f"{place}.{name}": tensor.contiguous()
        for place, parameter in enumerate(parameters)
        for name, tensor in optimizer.state[parameter].items()
    }
    save_file(tensors, folder / _OPTIMIZER)


def load_optimizer(
    folder: Path, optimizer: torch.optim.Optimizer, parameters: Sequence[torch.nn.Parameter]
) -> None:
    """Remember again what `save_optimizer` kept, number types included."""
    for key, tensor in load_file(folder / _OPTIMIZER).items():
        place, _, name = key.partition(".")
        parameter = parameters[int(place)]
        optimizer.state[parameter][name] = tensor.to(parameter.device)

"""What of a base model's architecture decides how much memory its training takes. Reads a folder of weights
without torch: `config.json` and the headers of the safetensors files.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.core.tensors import read_header

_IN_A_BLOCK = re.compile(r"\.\d+\.")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True, slots=True)
class Linear:
    """One weight matrix of the blocks; its name ends in the layer's own."""

    name: str
    outputs: int
    inputs: int


@dataclass(frozen=True, slots=True)
class Shape:
    """A dense decoder. Sizes are elements."""

    parameters: int  # of all tensors on disk; tied embeddings stand there once
    linears: tuple[Linear, ...]
    layers: int
    hidden: int
    intermediate: int  # of one of the matrices of an MLP
    is_gated: bool  # three matrices a MLP instead of two
    heads: int
    key_heads: int
    head_size: int
    vocabulary: int

    @property
    def linear_parameters(self) -> int:
        """Elements of all weight matrices of the blocks."""
        return sum(linear.outputs * linear.inputs for linear in self.linears)

    def adapted(self, target_modules: Sequence[str] | None) -> list[Linear]:
        """The matrices a LoRA adapter changes; None or nothing means all, as everywhere."""
        if not target_modules:
            return list(self.linears)
        ends = tuple(f".{name}" for name in target_modules)
        return [linear for linear in self.linears if f".{linear.name}".endswith(ends)]


def read_shape(folder: Path) -> Shape | None:
    """The shape of the model in `folder`; None where it cannot be told, as of a mixture of experts."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = config.get("text_config", config)
        if any(config.get(name) for name in _EXPERTS):
            return None
        tensors = dict(_tensors(folder))
        return _shape(config, tensors) if tensors else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError):
        return None


def _shape(config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> Shape:
    linears = tuple(
        Linear(name.removesuffix(".weight"), size[0], size[1])
        for name, size in tensors.items()
        if len(size) == 2 and name.endswith(".weight") and _IN_A_BLOCK.search(name)
    )
    hidden, heads = _first(config, "hidden_size", "n_embd"), _first(config, "num_attention_heads", "n_head")
    return Shape(
        parameters=sum(map(math.prod, tensors.values())),
        linears=linears,
        layers=_first(config, "num_hidden_layers", "n_layer"),
        hidden=hidden,
        intermediate=config.get("intermediate_size") or config.get("n_inner") or 4 * hidden,
        is_gated=any("gate" in linear.name.rpartition(".")[2] for linear in linears),
        heads=heads,
        key_heads=config.get("num_key_value_heads") or heads,
        head_size=config.get("head_dim") or hidden // heads,
        vocabulary=_first(config, "vocab_size"),
    )


def _first(config: Mapping[str, Any], *names: str) -> int:
    """The value under the first of `names` that is there; raises KeyError where none is."""
    return int(config[next((name for name in names if name in config), names[0])])


def _tensors(folder: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in read_header(path)[0].items():
            if name != "__metadata__":
                yield name, tuple(tensor["shape"])

"""Reads PEFT's adapter folders into factors a batch can mix. Safetensors only; plain LoRA only.

Knows PEFT's file format and the sizes of the model's layers; no model, no slots, no requests.
"""

from __future__ import annotations

import logging
import math
import re
from dataclasses import dataclass
from pathlib import Path

from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor

from app.core.manifest import DamagedError, verify
from worker.serving.lora import Factors, bucket_of

WEIGHTS_FILE = "adapter_model.safetensors"
_KEY = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<factor>[AB])\.weight")
_EXTRAS = (
    "use_dora",
    "use_qalora",
    "lora_bias",
    "alora_invocation_tokens",
    "modules_to_save",
    "target_parameters",
    "layer_replication",
    "trainable_token_indices",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # others change the base's own weights
_log = logging.getLogger(__name__)


class ModelUnavailable(Exception):
    """Tuned weights cannot be loaded: missing, damaged, or of a kind that cannot share a batch."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """All factors by the layer's path in the model; `bucket` is the padded rank of the largest."""

    factors: dict[str, Factors]
    bucket: int
    size_bytes: int


def weights_size_bytes(folder: Path) -> int:
    """Size of the weights' file; raises ModelUnavailable if it is not there."""
    try:
        return (folder / WEIGHTS_FILE).stat().st_size
    except OSError:
        raise ModelUnavailable("its files are missing") from None


def read_adapter(folder: Path, *, sizes: dict[str, tuple[int, int]], like: Tensor) -> Adapter:
    """The adapter of a PEFT folder, on the device and in the number type of `like`.

    sizes: inputs and outputs of every linear layer of the model. Raises ModelUnavailable for what is not as
    it was written, does not fit, or is not plain LoRA: biases, whole modules and LoRA's variants change rows
    that did not ask for them, or cannot be mixed in one batch.
    """
    check_whole(folder)
    try:
        config = PeftConfig.from_pretrained(str(folder), local_files_only=True)
        tensors = load_file(folder / WEIGHTS_FILE, device="cpu")
    except Exception as error:
        _log.warning("adapter in %s cannot be read: %s", folder, error)
        raise ModelUnavailable("its files cannot be read") from error
    if not isinstance(config, LoraConfig) or _is_special(config):
        raise ModelUnavailable("it is not a plain LoRA adapter")
    try:
        factors = _factors(config, tensors, sizes=sizes, like=like)
    except ValueError as error:
        _log.warning("adapter in %s does not fit the model: %s", folder, error)
        raise ModelUnavailable("its weights do not fit the base model") from error
    rank = max(each.down.shape[1] for each in factors.values())
    size_bytes = sum(t.numel() * t.element_size() for each in factors.values() for t in each)
    return Adapter(factors, bucket_of(rank), size_bytes)


def check_whole(folder: Path) -> None:
    """Raise ModelUnavailable unless every byte of the weights is what their trainer wrote."""
    try:
        verify(folder)
    except DamagedError as error:
        _log.error("weights in %s are refused: %s", folder, error)
        raise ModelUnavailable("its files are missing or damaged") from error


def _factors(
    config: LoraConfig, tensors: dict[str, Tensor], *, sizes: dict[str, tuple[int, int]], like: Tensor
) -> dict[str, Factors]:
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"unknown tensor {key}")
        pairs.setdefault(match["layer"], {})[match["factor"]] = tensor
    wanted = {layer for layer in sizes if check_target_module_exists(config, layer)}
    if not pairs or pairs.keys() != wanted:
        raise ValueError(f"layers differ: {sorted(pairs.keys() ^ wanted)[:3]}")
    factors = {}
    for layer, pair in pairs.items():
        if pair.keys() != {"A", "B"}:
            raise ValueError(f"half of {layer} is missing")
        a_RI, b_OR = pair["A"], pair["B"]
        rank = a_RI.shape[0]
        if a_RI.shape != (rank, sizes[layer][0]) or b_OR.shape != (sizes[layer][1], rank) or rank < 1:
            raise ValueError(f"shapes of {layer}")
        up_RO = b_OR.T.float() * _scaling(config, layer, rank)
        factors[layer] = Factors(a_RI.T.to(like).contiguous(), up_RO.to(like).contiguous())
    return factors


def _scaling(config: LoraConfig, layer: str, rank: int) -> float:
    """LoRA's alpha / r, or alpha / sqrt(r) (Kalajdzievski 2023, "rsLoRA")."""
    key = get_pattern_key(list(config.alpha_pattern or {}), layer)
    alpha = (config.alpha_pattern or {}).get(key, config.lora_alpha)
    return float(alpha / math.sqrt(rank) if config.use_rslora else alpha / rank)


def _is_special(config: LoraConfig) -> bool:
    if config.bias != "none" or any(getattr(config, name, None) for name in _EXTRAS):
        return True
    return config.init_lora_weights not in _PLAIN_STARTS

"""LoRA adapters inside one base model: loaded when asked for, dropped when long unused, chosen per row.

The layers are peft's; rows are routed by peft's own mixed-batch forward, whose `adapter_names` reach the
layers through hooks set once per layer (peft itself would set and remove them in every forward pass).
Knows folders and layers, nothing of requests, queues or text.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.functional import delete_adapter, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer, LoraModel
from safetensors.torch import load_file
from torch import Tensor, device, nn

from app.core.completions import TunedWeights

BASE = "__base__"  # peft's word for a row without an adapter
WEIGHTS_FILE = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."  # peft writes it before the model's own names
_log = logging.getLogger(__name__)


class ModelUnavailable(Exception):
    """Tuned weights cannot be loaded: missing, damaged, or of a kind that cannot share a batch."""


class AdapterSet:
    """Up to `max_adapters` adapters in one model. Only the engine's thread calls it."""

    def __init__(self, model: nn.Module, *, max_adapters: int, device: device) -> None:
        self._model = model
        self._device = device
        self._max_adapters = max_adapters
        self._tuner: LoraModel | None = None
        self._loaded: OrderedDict[str, None] = OrderedDict()  # least recently used first
        self._users: Counter[str] = Counter()
        self._hooked: set[nn.Module] = set()
        self._row_names: list[str] = []

    def __len__(self) -> int:
        return len(self._loaded)

    def acquire(self, tuned: TunedWeights | None) -> str | None:
        """Name of the adapter, loaded and kept until `release`; None if all places are in use.

        Raises ModelUnavailable when the folder is missing, damaged or of an unsupported kind.
        """
        name = self.load(tuned) if tuned is not None else BASE
        if name is not None and name != BASE:
            self._users[name] += 1
        return name

    def release(self, name: str | None) -> None:
        """Give back what `acquire` returned; the adapter stays loaded until its place is needed."""
        if name is not None and name != BASE:
            self._users[name] -= 1

    def load(self, tuned: TunedWeights) -> str | None:
        """Load without using it yet; otherwise as `acquire`."""
        name = adapter_name(tuned.id)
        if name not in self._loaded:
            if not self._make_place():
                return None
            self._inject(name, Path(tuned.path))
            self._loaded[name] = None
        self._loaded.move_to_end(name)
        return name

    def route(self, names: list[str]) -> None:
        """Say which adapter each row of the coming forward passes uses."""
        self._row_names = names

    def _make_place(self) -> bool:
        while len(self._loaded) >= self._max_adapters:
            idle = next((name for name in self._loaded if not self._users[name]), None)
            if idle is None:
                return False
            self._drop(idle)
        return True

    def _drop(self, name: str) -> None:
        delete_adapter(self._model, name, prefix=LoraModel.prefix, layer_cls=LoraLayer)
        if self._tuner is not None:
            self._tuner.peft_config.pop(name, None)
        self._loaded.pop(name, None)
        self._users.pop(name, None)

    def _inject(self, name: str, folder: Path) -> None:
        """Add the layers, then the numbers. A failure leaves no trace in the model's answers."""
        config, weights = read_adapter(folder, self._device)
        try:
            self._add_layers(name, config)
            self._fill(name, weights)
        except Exception as error:
            _log.warning("adapter in %s does not fit the model: %s", folder, error)
            self._prepare_layers()
            self._drop(name)
            raise ModelUnavailable("its weights do not fit the base model") from error
        self._model.eval()  # new dropout layers start in training mode

    def _add_layers(self, name: str, config: LoraConfig) -> None:
        """Empty layers first (meta device): random numbers would only be thrown away."""
        if self._tuner is None:
            self._tuner = LoraModel(self._model, config, name, low_cpu_mem_usage=True)
        else:
            self._tuner.peft_config[name] = config
            self._tuner.inject_adapter(self._model, name, low_cpu_mem_usage=True)
        self._prepare_layers()

    def _prepare_layers(self) -> None:
        """Route every LoRA layer by row. None is active: peft warns when an active one is deleted."""
        if self._tuner is not None:
            self._tuner.active_adapter = []
        for module in self._model.modules():
            if not isinstance(module, LoraLayer):
                continue
            module.set_adapter([])
            if module not in self._hooked:
                module.register_forward_pre_hook(self._name_rows, with_kwargs=True)
                self._hooked.add(module)

    def _fill(self, name: str, weights: dict[str, Tensor]) -> None:
        result: Any = set_peft_model_state_dict(
            self._model, weights, adapter_name=name, low_cpu_mem_usage=True
        )
        missing = [key for key in result.missing_keys if name in key]
        if missing or result.unexpected_keys:
            raise ValueError(f"{len(missing)} tensors missing, {len(result.unexpected_keys)} unknown")

    def _name_rows(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, "adapter_names": self._row_names}


def adapter_name(tuned_id: str) -> str:
    """A name torch accepts for a module (no dots), the same for the same id and different for all others."""
    return "a" + hashlib.sha256(tuned_id.encode()).hexdigest()[:24]


def read_adapter(folder: Path, device: device) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Configuration and tensors of a PEFT folder; safetensors only.

    Raises ModelUnavailable for what is not there, not readable, or not plain LoRA: biases, whole modules and
    LoRA's variants change rows that did not ask for them, or cannot be mixed in one batch.
    """
    if not (folder / WEIGHTS_FILE).is_file():
        raise ModelUnavailable("its files are missing")
    try:
        config = PeftConfig.from_pretrained(str(folder), local_files_only=True)
        tensors = load_file(folder / WEIGHTS_FILE, device=str(device))
    except Exception as error:
        _log.warning("adapter in %s cannot be read: %s", folder, error)
        raise ModelUnavailable("its files cannot be read") from error
    if not isinstance(config, LoraConfig) or _is_special(config):
        raise ModelUnavailable("it is not a plain LoRA adapter")
    config.inference_mode = True
    return config, {key.removeprefix(KEY_PREFIX): tensor for key, tensor in tensors.items()}


def _is_special(config: LoraConfig) -> bool:
    extras = (
        "use_dora",
        "alora_invocation_tokens",
        "modules_to_save",
        "target_parameters",
        "layer_replication",
    )
    return config.bias != "none" or any(getattr(config, name, None) for name in extras)

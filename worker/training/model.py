"""The model of one attempt: base model and adapter, put together, saved and taken apart again.

The base model and tokenizer stay in memory from job to job. Knows no data and no optimizer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file

from worker.base_model import load_base_model, load_tokenizer
from worker.training.attention import SEGMENTED
from worker.training.errors import TrainingError
from worker.training.words import Adapter, TrainSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTER_CONFIG = "adapter_config.json"


class WarmBase:
    """The base model used last, kept for the next job. At most one: memory belongs to training."""

    def __init__(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        self.device = device
        self.dtype = dtype  # None: what suits the device
        self._key: tuple[str, bool] | None = None
        self._model: PreTrainedModel | None = None

    def take(self, dir: str, *, quantize_4bit: bool) -> PreTrainedModel:
        """The frozen base model of `dir`. Whoever takes it leaves it as it was, or calls `drop`."""
        key = (dir, quantize_4bit)
        if self._model is None or self._key != key:
            self.drop()
            self._model = self._load(dir, quantize_4bit=quantize_4bit, dtype=self.dtype)
            self._key = key
        return self._model

    def load_fresh(self, dir: str) -> PreTrainedModel:
        """A model of its own in float32, for training that changes the weights themselves."""
        self.drop()
        return self._load(dir, quantize_4bit=False, dtype=torch.float32)

    def drop(self) -> None:
        """Forget the model and give its memory back."""
        self._key = self._model = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _load(self, dir: str, *, quantize_4bit: bool, dtype: torch.dtype | None) -> PreTrainedModel:
        model = load_base_model(dir, quantize_4bit=quantize_4bit, device=self.device, dtype=dtype)
        model.set_attn_implementation(SEGMENTED)
        return model


class TunedModel:
    """A model in training. `model` runs forward; `save` writes what was learned."""

    def __init__(self, model: PreTrainedModel, peft: PeftModel | None, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self._peft = peft
        self._tokenizer = tokenizer

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """What the optimizer changes."""
        return [weight for weight in self.model.parameters() if weight.requires_grad]

    def save(self, dir: Path) -> None:
        """Write a PEFT folder, or a whole model with its tokenizer, into the folder `dir`; safetensors only."""
        if self._peft is None:
            self.model.save_pretrained(dir)
            self._tokenizer.save_pretrained(dir)
            return
        # Not PeftModel.save_pretrained: it adds a model card and asks the hub about the vocabulary.
        tensors = get_peft_model_state_dict(self._peft, save_embedding_layers=False)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, dir / "adapter_model.safetensors")
        config = self._peft.peft_config["default"].to_dict() | {"inference_mode": True}
        text = json.dumps(config, indent=2, sort_keys=True, default=_plain)
        (dir / ADAPTER_CONFIG).write_text(text + "\n")


@contextmanager
def tuned_model(spec: TrainSpec, warm: WarmBase) -> Iterator[TunedModel]:
    """The model `spec` asks for; afterwards the warm base is as it was before."""
    tokenizer = load_tokenizer(spec.base_model_dir)
    if spec.chat_template is not None:
        tokenizer.chat_template = spec.chat_template
    if spec.adapter is Adapter.FULL:
        yield TunedModel(_full(spec, warm), None, tokenizer)
        return
    base = warm.take(spec.base_model_dir, quantize_4bit=spec.adapter is Adapter.QLORA)
    peft = None
    try:
        peft = _with_lora(base, spec)
        yield TunedModel(base, peft, tokenizer)
    except BaseException:
        warm.drop()  # in what state it is now, nobody knows
        raise
    if peft is not None:
        peft.unload()
        base.requires_grad_(False)


def _full(spec: TrainSpec, warm: WarmBase) -> PreTrainedModel:
    start = spec.start_from_dir or spec.base_model_dir
    if (Path(start) / ADAPTER_CONFIG).exists():
        raise _wrong_start("a LoRA adapter", "full")
    model = warm.load_fresh(start)
    return model.requires_grad_(True)


def _with_lora(base: PreTrainedModel, spec: TrainSpec) -> PeftModel:
    if spec.start_from_dir is None:
        return get_peft_model(base, _lora_config(spec))
    if not (Path(spec.start_from_dir) / ADAPTER_CONFIG).exists():
        raise _wrong_start("a whole model", spec.adapter)
    return PeftModel.from_pretrained(base, spec.start_from_dir, is_trainable=True)


def _lora_config(spec: TrainSpec) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=list(spec.target_modules) or "all-linear",
        # A name, not a path of this machine: the folder travels.
        base_model_name_or_path=Path(spec.base_model_dir).name,
    )


def _wrong_start(what: str, adapter: str) -> TrainingError:
    return TrainingError(
        "invalid_model",
        f"The model to go on from is {what}, which method luthier.adapter={adapter} cannot continue. "
        "Use the adapter that model was made with.",
        param="model",
    )


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)

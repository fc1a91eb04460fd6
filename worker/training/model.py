"""The model of one attempt: base model and adapter, put together, saved and taken apart again.

The base model and tokenizer stay in memory from job to job. Knows no data and no optimizer.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file

from app.core.failures import FailureCode
from app.core.memory import MOST_TOKENS
from worker.base_model import compute_dtype, load_base_model, load_tokenizer
from worker.chat_template import TokenizedExample
from worker.training.attention import SEGMENTED
from worker.training.data import FlatBatch, flatten, micro_batches
from worker.training.errors import TrainingError
from worker.training.lora import speed_up
from worker.training.loss import Sums, label_log_probabilities, loss_sums
from worker.training.shape import ADAPTER_WEIGHTS, check_count, chosen_layers, factor_count, put_in
from worker.training.words import Adapter, TrainSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTER_CONFIG = "adapter_config.json"
MAX_SHRINKS = 4  # each halves the tokens of one pass


class WarmBase:
    """The base model used last, kept for the next job. At most one: memory belongs to training."""

    def __init__(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        self.device = device
        self.dtype = dtype or compute_dtype(device)
        self._tokenizer: tuple[str, PreTrainedTokenizerBase] | None = None
        self._key: tuple[str, bool] | None = None
        self._model: PreTrainedModel | None = None

    def tokenizer(self, dir: str) -> PreTrainedTokenizerBase:
        """The tokenizer of `dir`, not to be changed."""
        if self._tokenizer is None or self._tokenizer[0] != dir:
            self._tokenizer = (dir, load_tokenizer(dir))
        return self._tokenizer[1]

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

    def _load(self, dir: str, *, quantize_4bit: bool, dtype: torch.dtype) -> PreTrainedModel:
        model = load_base_model(dir, quantize_4bit=quantize_4bit, device=self.device, dtype=dtype)
        model.set_attn_implementation(SEGMENTED)
        return model


class TunedModel:
    """A model in training. `sums` runs it forward; `save` writes what was learned."""

    def __init__(
        self, model: PreTrainedModel, peft: PeftModel | None, spec: TrainSpec, warm: WarmBase
    ) -> None:
        self.model = model
        self.device = warm.device
        self.max_tokens = MOST_TOKENS[self.device.type]
        self.shrinks = 0  # how often `max_tokens` was lowered
        # Exact only without dropout, which draws anew for each example.
        self._share_prefixes = spec.dropout == 0.0
        self.parameters = [weight for weight in model.parameters() if weight.requires_grad]
        self._peft = peft
        self._spec = spec
        self.dtype = warm.dtype

    def sums(self, examples: Sequence[TokenizedExample]) -> Sums:
        """`loss_sums` in the number type of the device, also where the weights themselves are float32."""
        batch = self.flat(examples)
        with self.autocast():
            return loss_sums(self.model, batch)

    def log_probabilities(self, example: TokenizedExample) -> torch.Tensor:
        """log p of each label of one example in float32 nats, as `sums` computes them."""
        batch = self.flat([example])
        with self.autocast():
            return label_log_probabilities(self.model, batch)

    def autocast(self) -> torch.autocast:
        """Products in the number type of the device."""
        mixed = self.dtype is not torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=mixed)

    @contextmanager
    def bare(self) -> Iterator[PreTrainedModel]:
        """The model with its own layers, as an engine finds it; afterwards peft's are back."""
        layers = [(name, m) for name, m in self.model.named_modules() if isinstance(m, BaseTunerLayer)]
        for name, layer in layers:
            self.model.set_submodule(name, layer.get_base_layer())
        try:
            yield self.model
        finally:
            for name, layer in layers:
                self.model.set_submodule(name, cast(torch.nn.Module, layer))

    def flat(self, examples: Sequence[TokenizedExample]) -> FlatBatch:
        """`examples` as one pass takes them."""
        return flatten(examples, self.device, share_prefixes=self._share_prefixes)

    def parts(self, examples: Sequence[TokenizedExample]) -> Iterator[list[TokenizedExample]]:
        """`examples` in parts that fit into memory, those that begin alike together."""
        return micro_batches(examples, self.max_tokens, share_prefixes=self._share_prefixes)

    def shrink(self, batch: Sequence[TokenizedExample]) -> bool:
        """Halve the tokens of one pass, so that `batch` takes more of them; False where it cannot."""
        parts = list(self.parts(batch))
        if len(parts) == len(batch):
            return False
        largest = max(sum(self.flat(part).lengths) for part in parts)
        self.max_tokens = min(largest, self.max_tokens) // 2
        self.shrinks += 1
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # in pieces that no longer fit
        return True

    def check(self) -> None:
        """Raises TrainingError where what was trained is of no use to anybody."""
        if not all(bool(torch.isfinite(weight).all()) for weight in self.parameters):
            what = "The trained weights hold numbers that are not finite, so the run diverged. Lower"
        elif self._peft is not None and not any(
            bool(weight.any()) for name, weight in self._peft.named_parameters() if ".lora_B." in name
        ):
            what = "The adapter is still zero: training moved none of its weights. Raise"
        else:
            return
        raise TrainingError(
            FailureCode.NON_FINITE_ADAPTER,
            f"{what} learning_rate_multiplier and try again.",
            param="hyperparameters.learning_rate_multiplier",
        )

    def save(self, dir: Path) -> None:
        """Write a PEFT folder, or a whole model with its tokenizer, into `dir`; safetensors only."""
        if self._peft is None:
            self.model.save_pretrained(dir)
            tokenizer = load_tokenizer(self._spec.base_model_dir)
            tokenizer.chat_template = self._spec.chat_template or tokenizer.chat_template
            tokenizer.save_pretrained(dir)
            return
        # Not PeftModel.save_pretrained: it adds a model card and asks the hub about the vocabulary.
        tensors = get_peft_model_state_dict(self._peft, save_embedding_layers=False)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, dir / ADAPTER_WEIGHTS)
        config = self._peft.peft_config["default"].to_dict() | {
            "inference_mode": True,
            "base_model_name_or_path": Path(self._spec.base_model_dir).name,  # no path of this machine
        }
        text = json.dumps(config, indent=2, sort_keys=True, default=_plain)
        (dir / ADAPTER_CONFIG).write_text(text + "\n")


@contextmanager
def tuned_model(spec: TrainSpec, warm: WarmBase, *, weights_dir: Path | None = None) -> Iterator[TunedModel]:
    """The model `spec` asks for; afterwards the warm base is as it was before.

    `weights_dir` is a checkpoint of this very run, to go on with its weights.
    """
    torch.manual_seed(spec.seed)  # LoRA's first factors and dropout
    start = spec.start_from_dir if weights_dir is None else str(weights_dir)
    if spec.adapter is Adapter.FULL:
        yield TunedModel(_full(start or spec.base_model_dir, warm), None, spec, warm)
        return
    base = warm.take(spec.base_model_dir, quantize_4bit=spec.adapter is Adapter.QLORA)
    asked = factor_count(chosen_layers(base, spec.target_modules), spec.rank)
    peft = None
    try:
        peft = _with_lora(base, spec, start=start, asked=asked)
        speed_up(base)
        yield TunedModel(base, peft, spec, warm)
    except BaseException:
        warm.drop()  # in what state it is now, nobody knows
        raise
    if peft is not None:
        peft.unload()
        base.requires_grad_(False)


def _full(start: str, warm: WarmBase) -> PreTrainedModel:
    if (Path(start) / ADAPTER_CONFIG).exists():
        raise _wrong_start("a LoRA adapter", "full")
    model = warm.load_fresh(start)
    return model.requires_grad_(True)


def _with_lora(base: PreTrainedModel, spec: TrainSpec, *, start: str | None, asked: int) -> PeftModel:
    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5.23 for an attribute under its old name
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        peft = cast(PeftModel, get_peft_model(base, _lora_config(spec)))
    check_count([weight for weight in peft.parameters() if weight.requires_grad], asked)
    if start is not None:
        if not (Path(start) / ADAPTER_CONFIG).exists():
            raise _wrong_start("a whole model", spec.adapter)
        put_in(peft, Path(start), spec)
    return peft


def _lora_config(spec: TrainSpec) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=spec.rank,
        lora_alpha=cast(int, spec.alpha),  # a float is as good: it is only divided by the rank
        use_rslora=spec.use_rslora,
        lora_dropout=spec.dropout,
        target_modules=list(spec.target_modules) or "all-linear",
    )


def _wrong_start(what: str, adapter: str) -> TrainingError:
    return TrainingError(
        FailureCode.INVALID_MODEL,
        f"The model to go on from is {what}, which method luthier.adapter={adapter} cannot continue. "
        "Use the adapter that model was made with.",
        param="model",
    )


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)

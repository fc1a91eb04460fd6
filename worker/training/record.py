"""How a checkpoint came to be, kept beside it: enough to make the same bytes again. Knows no user.

Digests of data, base weights and chat template, versions of libraries, all numbers of the run, its metrics.
No times: a run that was interrupted leaves the record of one that was not.
"""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from app.core.base_models import read_manifest
from worker.training.plan import Plan
from worker.training.words import Metrics, TrainSpec

RECORD = "training_record.json"
_LIBRARIES = ("torch", "transformers", "tokenizers", "peft", "bitsandbytes", "safetensors", "luthier")
# What else a spec holds is where things lie and which try it is.
_NUMBERS = (
    "adapter",
    "rank",
    "alpha",
    "use_rslora",
    "dropout",
    "target_modules",
    "n_epochs",
    "batch_size",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_ratio",
    "max_grad_norm",
    "early_stopping_patience",
    "seed",
    "max_length",
)


class Record:
    """All of it but the metrics, gathered once a run."""

    def __init__(self, plan: Plan, device: torch.device, dtype: torch.dtype, *, parameters: int) -> None:
        spec = plan.spec
        numbers = spec.model_dump(mode="json", include=set(_NUMBERS))
        self._fields: dict[str, Any] = {
            "training_examples_sha256": plan.fingerprint["training_file"],
            "validation_examples_sha256": (
                plan.fingerprint["validation_file"] if plan.validation.examples else None
            ),
            "base_model_sha256": _weights_sha256(Path(spec.base_model_dir)),
            "start_from_sha256": _start_sha256(spec),
            "chat_template_sha256": None if spec.chat_template is None else _sha256(spec.chat_template),
            "hyperparameters": numbers,
            "total_steps": plan.total_steps,
            "trained_parameters": parameters,
            "device": {
                "type": device.type,
                "name": _name(device),
                "dtype": str(dtype).removeprefix("torch."),
            },
            "versions": {name: _version(name) for name in _LIBRARIES},
        }

    def write(self, folder: Path, metrics: Metrics, *, base_loss: float | None) -> None:
        """Keep it in a checkpoint folder, with the loss on the validation file before training."""
        results = {"metrics": metrics.model_dump(exclude_none=True), "base_full_valid_loss": base_loss}
        record = self._fields | results
        (folder / RECORD).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


def _weights_sha256(folder: Path) -> dict[str, str]:
    """Digest of each file of a base model, as it was pulled; computed where nobody wrote them down."""
    manifest = read_manifest(folder)
    if manifest is not None:
        return {name: file["sha256"] for name, file in sorted(manifest["files"].items())}
    return {path.name: _file_sha256(path) for path in sorted(folder.glob("*")) if path.is_file()}


def _start_sha256(spec: TrainSpec) -> dict[str, str] | None:
    if spec.start_from_dir is None:
        return None
    return {path.name: _file_sha256(path) for path in sorted(Path(spec.start_from_dir).glob("*.safetensors"))}


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else torch.backends.cpu.get_cpu_capability()
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None

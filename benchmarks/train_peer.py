"""The peer of `make bench-train`: TRL's SFTTrainer over peft, driven step by step over its two pipes.

Runs in an environment of its own and imports nothing of Luthier. `train_peer.py FOLDER CHECK`: FOLDER holds
`work.json` (rows of token ids and labels, numbers of the run) and `init/` (the adapter to begin with).
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer


class Turns(TrainerCallback):  # type: ignore[misc]
    """Trains only on demand: each line of stdin is a number of steps, answered when they are done."""

    def __init__(self, answers: Any) -> None:
        self._answers = answers
        self._left = 0
        self._losses: list[float] = []
        self._began = (0.0, 0.0)
        self._tokens = [0, 0]  # real ones in all, at the beginning of the turn and now

    def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
        if self._left:
            return
        line = sys.stdin.readline()
        if not line.strip():
            os._exit(0)
        self._left, self._losses, self._tokens[0] = int(line), [], self._tokens[1]
        self._began = time.monotonic(), time.process_time()

    def on_log(self, _args: Any, _state: Any, _control: Any, logs: dict[str, float], **_kwargs: Any) -> None:
        if "loss" in logs:
            self._losses.append(float(logs["loss"]))
            self._tokens[1] = int(float(logs["num_tokens"]))
            self._left -= 1
            if not self._left:
                self._answer()

    def _answer(self) -> None:
        wall_s, cpu_s = time.monotonic() - self._began[0], time.process_time() - self._began[1]
        answer: dict[str, Any] = {
            "wall_s": wall_s,
            "cpu_s": cpu_s,
            "tokens": self._tokens[1] - self._tokens[0],
        }
        answer["losses"] = self._losses
        self._answers.write(json.dumps(answer) + "\n")
        self._answers.flush()


def main() -> None:
    """Train until told to stop."""
    folder, check = Path(sys.argv[1]), sys.argv[2] == "check"
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr
    work = json.loads((folder / "work.json").read_text())
    torch.set_num_threads(work["threads"])
    base = AutoModelForCausalLM.from_pretrained(work["model_dir"], dtype=torch.float32)
    base.requires_grad_(False)
    model = PeftModel.from_pretrained(base, folder / "init", is_trainable=True)
    trainer = SFTTrainer(
        model=model,
        args=settings(work, folder, check=check),
        train_dataset=Dataset.from_list([{"input_ids": row[0], "labels": row[1]} for row in work["rows"]]),
        processing_class=AutoTokenizer.from_pretrained(work["model_dir"]),
        callbacks=[Turns(answers)],
    )
    trainer.train()


def settings(work: dict[str, Any], folder: Path, *, check: bool) -> SFTConfig:
    """The fastest of those tried on CPUs; docs/benchmarks.md says which."""
    return SFTConfig(
        output_dir=str(folder / "out"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=work["batch_size"],
        gradient_accumulation_steps=work["accumulation"],
        learning_rate=work["rate"],
        lr_scheduler_type="constant" if check else "linear",
        num_train_epochs=work["epochs"],
        max_length=None,
        packing=False,
        padding_free=work["padding_free"],
        train_sampling_strategy="sequential" if check else "group_by_length",
        optim="adamw_torch_fused",
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )


if __name__ == "__main__":
    main()

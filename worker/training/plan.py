"""What a job trains on, read once at the beginning of each attempt. Knows no model and no optimizer."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from functools import cached_property

from worker.chat_template import ChatTemplate
from worker.training.data import Split, read_split
from worker.training.pulse import Pulse
from worker.training.resume import Fingerprint
from worker.training.words import Section, TrainSpec, TrainWord


@dataclass(frozen=True)
class Plan:
    """All there is to train, the same in every attempt at a job."""

    spec: TrainSpec
    training: Split
    validation: Split

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.training.examples) / self.spec.batch_size)

    @property
    def total_steps(self) -> int:
        return self.spec.n_epochs * self.steps_per_epoch

    @property
    def trained_tokens(self) -> int:
        return self.spec.n_epochs * self.training.tokens

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Attempts that agree in this are one run: each can go on where another was."""
        return {
            "total_steps": self.total_steps,
            "batch_size": self.spec.batch_size,
            "seed": self.spec.seed,
            "adapter": str(self.spec.adapter),
            "training_file": self.training.sha256(),
            "validation_file": self.validation.sha256(),
        }


def read_plan(spec: TrainSpec, template: ChatTemplate) -> Generator[TrainWord, None, Plan]:
    """Read and tokenise the job's files; raises TrainingError."""
    yield from Pulse(Section.SETUP).begin()
    training = yield from _read(spec, "training_file", template)
    validation = Split()
    if spec.validation_file is not None:
        validation = yield from _read(spec, "validation_file", template)
    return Plan(spec, training, validation)


def _read(spec: TrainSpec, param: str, template: ChatTemplate) -> Generator[TrainWord, None, Split]:
    split = yield from read_split(
        getattr(spec, param),
        param,
        template=template,
        max_length=spec.max_length,
        max_line_bytes=spec.max_line_bytes,
    )
    yield from split.warnings(param.removesuffix("_file"), spec.max_length)
    return split

"""Validation: loss and token accuracy of a small fixed sample during an epoch, of the whole file at its end.

Knows no optimizer; it leaves weights, gradients and random states as they were.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence

import torch

from worker.chat_template import TokenizedExample
from worker.training.data import sample_examples
from worker.training.errors import device_out_of_memory, is_device_out_of_memory
from worker.training.model import MAX_SHRINKS, TunedModel
from worker.training.pulse import Pulse
from worker.training.words import Section, Working

SAMPLE_EXAMPLES = 16  # a few per cent of noise at 115 tokens each, for a second of a laptop's time
SAMPLES_PER_EPOCH = 4


class Validator:
    """The examples of a validation file, none without one, and when to measure them."""

    def __init__(self, examples: Sequence[TokenizedExample], *, seed: int, steps_per_epoch: int) -> None:
        chosen = set(sample_examples(examples, SAMPLE_EXAMPLES, seed))
        self._sample = [example for index, example in enumerate(examples) if index in chosen]
        self._rest = [example for index, example in enumerate(examples) if index not in chosen]
        self._interval = max(1, steps_per_epoch // SAMPLES_PER_EPOCH)

    def measure(
        self, tuned: TunedModel, step: int, *, epoch_end: bool
    ) -> Generator[Working, None, dict[str, float]]:
        """The fields of `Metrics` that are due after `step`; empty where nothing is due.

        The full pass at an epoch's end contains the sample, so nothing is computed twice.
        """
        if not self._sample or not (epoch_end or step % self._interval == 0):
            return {}
        pulse = Pulse(Section.VALIDATION, step)
        yield from pulse.begin()
        sample = yield from _score(tuned, self._sample, pulse)
        measured = _named("valid", sample)
        if epoch_end:
            rest = yield from _score(tuned, self._rest, pulse)
            measured |= _named("full_valid", sample + rest)
        return measured


def _score(
    tuned: TunedModel, examples: Sequence[TokenizedExample], pulse: Pulse
) -> Generator[Working, None, torch.Tensor]:
    """`_pass`, begun anew in smaller parts where the device has no room."""
    while True:
        try:
            return (yield from _pass(tuned, examples, pulse))
        except Exception as error:
            if not is_device_out_of_memory(error):
                raise
        # Past the handler: the error's traceback holds the tensors of the failed pass.
        if tuned.shrinks >= MAX_SHRINKS or not tuned.shrink(examples):
            raise device_out_of_memory()


def _pass(
    tuned: TunedModel, examples: Sequence[TokenizedExample], pulse: Pulse
) -> Generator[Working, None, torch.Tensor]:
    """Summed loss, right tokens and labels of `examples`, as a float64 vector of 3."""
    totals = torch.zeros(3, dtype=torch.float64)
    tuned.model.train(False)
    for part in tuned.parts(examples):
        with torch.no_grad():  # never across a word: whoever listens would compute without gradients too
            loss, correct, labels = tuned.sums(part)
        totals += torch.tensor([loss.item(), correct.item(), labels], dtype=torch.float64)
        yield from pulse.beat()
    tuned.model.train()
    return totals


def _named(prefix: str, totals: torch.Tensor) -> dict[str, float]:
    loss, correct, count = totals.tolist()
    mean = loss / count
    if not math.isfinite(mean):
        return {}  # JSON has no NaN; the next training step tells the user
    return {f"{prefix}_loss": mean, f"{prefix}_mean_token_accuracy": correct / count}

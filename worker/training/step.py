"""One optimizer step: forward and backward in parts that fit into memory, clip, move. Knows no files."""

from __future__ import annotations

import math
import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch

from app.core.failures import FailureCode
from worker.chat_template import TokenizedExample
from worker.training.data import label_count
from worker.training.errors import TrainingError, device_out_of_memory, is_device_out_of_memory
from worker.training.model import MAX_SHRINKS, TunedModel
from worker.training.pulse import Pulse
from worker.training.state import RandomState
from worker.training.words import Log, Section, Working


class Abandoned(Exception):
    """Asked to stop in the middle of a step: model, optimizer and random numbers are as before it."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Which step it is, its learning rate, the request to leave it, the norm to which gradients are cut."""

    step: int
    rate: float
    stop: threading.Event
    max_norm: float = 1.0


def train_step(
    tuned: TunedModel, optimizer: torch.optim.Optimizer, batch: Sequence[TokenizedExample], plan: StepPlan
) -> Generator[Working | Log, None, tuple[float, float]]:
    """One optimizer step; returns (loss, token accuracy) before it. Raises Abandoned when asked to stop.

    The loss is the mean negative log-likelihood in nats over all trained tokens of the batch, however it is
    split to fit into memory, so a batch's gradient does not depend on the machine.
    """
    loss, accuracy = yield from _fitting_backward(tuned, batch, plan)
    norm = torch.nn.utils.clip_grad_norm_(tuned.parameters, plan.max_norm)
    if not (math.isfinite(loss) and math.isfinite(norm.item())):
        raise TrainingError(
            FailureCode.NON_FINITE_LOSS,
            "The training loss is no longer a finite number, so the run diverged. "
            "Lower learning_rate_multiplier and try again.",
            param="hyperparameters.learning_rate_multiplier",
        )
    for group in optimizer.param_groups:
        group["lr"] = plan.rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, accuracy


def backward(
    tuned: TunedModel, batch: Sequence[TokenizedExample], pulse: Pulse, stop: threading.Event
) -> Generator[Working, None, tuple[float, float]]:
    """Add the gradient of the batch's mean loss to the parameters; return that loss and the accuracy."""
    count = label_count(batch)
    loss_sum, correct_sum = 0.0, 0
    for part in tuned.parts(batch):
        if stop.is_set():
            raise Abandoned
        loss, correct, _ = tuned.sums(part)
        (loss / count).backward()  # type: ignore[no-untyped-call]
        loss_sum += loss.item()
        correct_sum += int(correct.item())
        yield from pulse.beat()
    return loss_sum / count, correct_sum / count


def _fitting_backward(
    tuned: TunedModel, batch: Sequence[TokenizedExample], plan: StepPlan
) -> Generator[Working | Log, None, tuple[float, float]]:
    """`backward`, begun anew in smaller parts where the device has no room, with the same random numbers."""
    pulse = Pulse(Section.STEP, plan.step)
    yield from pulse.begin()
    random = RandomState.take(tuned.device)
    while True:
        try:
            return (yield from backward(tuned, batch, pulse, plan.stop))
        except Abandoned:
            _take_back(tuned, random)
            raise
        except Exception as error:
            if not is_device_out_of_memory(error):
                raise
        # Past the handler: the error's traceback holds the tensors of the failed pass.
        _take_back(tuned, random)
        if tuned.shrinks >= MAX_SHRINKS or not tuned.shrink(batch):
            raise device_out_of_memory()
        yield Log(
            level="warn",
            message=f"The device had too little memory in step {plan.step}. Batches are now computed in "
            f"parts of {tuned.max_tokens} tokens (halved {tuned.shrinks} of at most {MAX_SHRINKS} times); "
            "the batch size and the result stay the same.",
        )


def _take_back(tuned: TunedModel, random: RandomState) -> None:
    for parameter in tuned.parameters:
        parameter.grad = None
    random.put_back(tuned.device)

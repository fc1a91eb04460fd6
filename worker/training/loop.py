"""The training loop: one `TrainSpec` in, a stream of words out. This is the page to read first.

Pure: it knows files and tensors; who listens to the words, and what becomes of them, it does not know.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

import torch

from worker.base_model import pick_device
from worker.chat_template import ChatTemplate, TokenizedExample
from worker.training.checkpoint import write_checkpoint
from worker.training.data import Split, epoch_batches, label_count, micro_batches, read_split
from worker.training.errors import TrainingError, failure_of
from worker.training.evaluate import Validator
from worker.training.model import TunedModel, WarmBase, tuned_model
from worker.training.words import (
    CheckpointReady,
    Finished,
    Metrics,
    Started,
    StepDone,
    TrainSpec,
    TrainWord,
)

WARMUP_SHARE = 0.05  # of all steps: Adam's second moments are noise at first
MAX_GRADIENT_NORM = 1.0
WEIGHT_DECAY = 0.0  # runs are short, and a LoRA factor that decays pulls back to the base, not to nothing


def train(spec: TrainSpec, warm: WarmBase | None = None) -> Iterator[TrainWord]:
    """Run one attempt. The last word is `Finished` or `Failed`; errors that are ours are raised.

    `warm` keeps the base model for the next call. Closing the generator stops after the current step.
    """
    warm = warm or WarmBase(pick_device())
    try:
        yield from _attempt(spec, warm)
        return
    except Exception as error:
        failed = failure_of(error)
        if failed is None:
            raise
    yield failed


def _attempt(spec: TrainSpec, warm: WarmBase) -> Iterator[TrainWord]:
    template = ChatTemplate(warm.tokenizer(spec.base_model_dir), spec.chat_template)
    training = yield from _read(spec, "training_file", template)
    validation = Split()
    if spec.validation_file is not None:
        validation = yield from _read(spec, "validation_file", template)
    with tuned_model(spec, warm) as tuned:
        yield from _epochs(spec, tuned, training, validation.examples)


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


def _epochs(
    spec: TrainSpec, tuned: TunedModel, training: Split, validation: Sequence[TokenizedExample]
) -> Iterator[TrainWord]:
    steps_per_epoch = math.ceil(len(training.examples) / spec.batch_size)
    total_steps = spec.n_epochs * steps_per_epoch
    optimizer = _optimizer(tuned.parameters, spec.learning_rate)
    validator = Validator(validation, seed=spec.seed, steps_per_epoch=steps_per_epoch)
    yield Started(step=0)
    started = time.monotonic()
    step = tokens_seen = 0
    for epoch in range(1, spec.n_epochs + 1):
        for batch in epoch_batches(training.examples, spec.batch_size, seed=spec.seed, epoch=epoch):
            step += 1
            rate = learning_rate_at(step, total_steps, spec.learning_rate)
            loss, accuracy = train_step(tuned, optimizer, batch, rate)
            epoch_end = step == epoch * steps_per_epoch
            tokens = sum(len(example.ids) for example in batch)
            tokens_seen += tokens
            measured = yield from validator.measure(tuned, step, epoch_end=epoch_end)
            metrics = Metrics(step=step, train_loss=loss, train_mean_token_accuracy=accuracy, **measured)
            elapsed_s = time.monotonic() - started
            yield StepDone(
                metrics=metrics,
                total_steps=total_steps,
                epoch=epoch,
                learning_rate=rate,
                tokens=tokens,
                elapsed_s=elapsed_s,
                tokens_per_second=tokens_seen / elapsed_s,
            )
            if epoch_end or (spec.checkpoint_interval and step % spec.checkpoint_interval == 0):
                dir = write_checkpoint(Path(spec.output_dir), step, tuned.save)
                yield CheckpointReady(metrics=metrics, dir=str(dir))
    yield Finished(trained_tokens=training.tokens * spec.n_epochs, steps=total_steps)


def train_step(
    tuned: TunedModel, optimizer: torch.optim.Optimizer, batch: Sequence[TokenizedExample], rate: float
) -> tuple[float, float]:
    """One optimizer step at learning rate `rate`; returns (loss, token accuracy) before the step.

    The loss is the mean negative log-likelihood in nats over all trained tokens of the batch, however it is
    split to fit into memory, so a batch's gradient does not depend on the machine.
    """
    loss, accuracy = backward(tuned, batch)
    norm = torch.nn.utils.clip_grad_norm_(tuned.parameters, MAX_GRADIENT_NORM)
    if not (math.isfinite(loss) and math.isfinite(norm.item())):
        raise TrainingError(
            "non_finite_loss",
            "The training loss is no longer a finite number, so the run diverged. "
            "Lower learning_rate_multiplier and try again.",
            param="hyperparameters.learning_rate_multiplier",
        )
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, accuracy


def backward(tuned: TunedModel, batch: Sequence[TokenizedExample]) -> tuple[float, float]:
    """Add the gradient of the batch's mean loss to the parameters; return that loss and the accuracy."""
    count = label_count(batch)
    loss_sum, correct_sum = 0.0, 0
    for part in micro_batches(batch, tuned.max_tokens):
        loss, correct, _ = tuned.sums(part)
        (loss / count).backward()  # type: ignore[no-untyped-call]
        loss_sum += loss.item()
        correct_sum += int(correct.item())
    return loss_sum / count, correct_sum / count


def learning_rate_at(step: int, total_steps: int, peak: float) -> float:
    """Linear warm-up over the first 5 % of steps, then linear decay that would reach 0 one step past the end.

    `step` counts from 1. Linear decay: Defazio et al. 2023, "When, Why and How Much?".
    """
    warmup = max(1, round(WARMUP_SHARE * total_steps))
    rising = step / warmup
    falling = (total_steps + 1 - step) / (total_steps + 1 - warmup)
    return peak * min(rising, falling)


def _optimizer(parameters: list[torch.nn.Parameter], rate: float) -> torch.optim.AdamW:
    # Fused: one kernel for hundreds of small factors, where the plain loop spends more time in Python.
    return torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.999), weight_decay=WEIGHT_DECAY, fused=True)

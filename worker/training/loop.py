"""The training loop: one `TrainSpec` in, a stream of words out. This is the page to read first.

Pure: it knows files and tensors; who listens to the words, and what becomes of them, it does not know.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch

from app.core.manifest import TRAINING_STATE
from worker.base_model import pick_device
from worker.chat_template import ChatTemplate, TokenizedExample
from worker.training.agreement import Agreement, OpenServer
from worker.training.checkpoint import write_checkpoint
from worker.training.data import epoch_batches
from worker.training.errors import failure_of
from worker.training.evaluate import Validator
from worker.training.model import TunedModel, WarmBase, tuned_model
from worker.training.outcome import at_epoch_end, finished, is_over
from worker.training.plan import Plan, read_plan
from worker.training.pulse import Pulse
from worker.training.record import Record
from worker.training.resume import Progress, Resume, find_resume, step_of
from worker.training.room import tokens_a_pass
from worker.training.schedule import learning_rate_at
from worker.training.state import RandomState, load_optimizer, save_optimizer
from worker.training.step import Abandoned, StepPlan, train_step
from worker.training.words import (
    Baseline,
    CheckpointReady,
    Metrics,
    Section,
    Started,
    StepDone,
    Stopped,
    TrainSpec,
    TrainWord,
)

WEIGHT_DECAY = 0.0  # runs are short, and a LoRA factor that decays pulls back to the base, not to nothing
T = TypeVar("T")


class _Asked(Exception):
    """Somebody wants the attempt to end."""


def train(
    spec: TrainSpec,
    warm: WarmBase | None = None,
    *,
    stop: threading.Event | None = None,
    server: OpenServer | None = None,
) -> Iterator[TrainWord]:
    """Run one attempt. The last word is `Finished`, `Stopped` or `Failed`; errors that are ours are raised.

    `warm` keeps the base model for the next call. Once `stop` is set, the attempt ends after the present
    step with a checkpoint. Closing the generator ends it without one. `server` opens the engine that
    the result must agree with; without one nothing is compared.
    """
    warm = warm or WarmBase(pick_device())
    try:
        yield from _attempt(spec, warm, stop or threading.Event(), server)
        return
    except Exception as error:
        failed = failure_of(error)
        if failed is None:
            raise
    yield failed


def _attempt(
    spec: TrainSpec, warm: WarmBase, stop: threading.Event, server: OpenServer | None
) -> Iterator[TrainWord]:
    try:
        template = ChatTemplate(warm.tokenizer(spec.base_model_dir), spec.chat_template)
        plan = yield from _until_asked(stop, read_plan(spec, template))
        resume = yield from _until_asked(stop, find_resume(spec.resume_from, plan.fingerprint))
    except _Asked:
        yield Stopped(step=max((step_of(Path(folder)) for folder in spec.resume_from[:1]), default=0))
        return
    with tuned_model(spec, warm, weights_dir=resume.folder if resume else None) as tuned:
        agreement = server and Agreement(plan, tuned, warm.tokenizer(spec.base_model_dir), server)
        yield from _Run(plan, tuned, resume, agreement).words(stop)


def _until_asked(
    stop: threading.Event, words: Generator[TrainWord, None, T]
) -> Generator[TrainWord, None, T]:
    """Hand the words on; raises _Asked in between once `stop` is set."""
    while not stop.is_set():
        try:
            yield next(words)
        except StopIteration as end:
            result: T = end.value
            return result
    raise _Asked


class _Run:
    """The steps of one attempt, from a checkpoint on or from the beginning."""

    def __init__(
        self, plan: Plan, tuned: TunedModel, resume: Resume | None, agreement: Agreement | None
    ) -> None:
        self._plan = plan
        self._spec = plan.spec
        self._tuned = tuned
        self._agreement = agreement
        self._optimizer = _optimizer(tuned.parameters, plan.spec.learning_rate)
        self._validator = Validator(
            plan.validation.examples, seed=plan.spec.seed, steps_per_epoch=plan.steps_per_epoch
        )
        self._progress = Progress()
        tuned.max_tokens = tokens_a_pass(plan, tuned.device, tuned.dtype)
        if resume is not None:
            self._progress = resume.progress
            tuned.max_tokens = min(resume.progress.max_tokens or tuned.max_tokens, tuned.max_tokens)
            tuned.shrinks = resume.progress.shrinks
            load_optimizer(resume.folder, self._optimizer, tuned.parameters)
            RandomState.load(resume.folder).put_back(tuned.device)
        tuned.model.train()
        self._record = Record(
            plan, tuned.device, tuned.dtype, parameters=sum(weight.numel() for weight in tuned.parameters)
        )
        self._kept = self._progress.step  # the step of the last checkpoint
        self._kept_at = time.monotonic()

    def words(self, stop: threading.Event) -> Iterator[TrainWord]:
        """Train to the end, or until `stop` is set; what is done by then is kept."""
        if stop.is_set():
            yield Stopped(step=self._kept)
            return
        yield Started(step=self._kept)
        try:
            yield from _until_asked(stop, self._measure_start())
        except _Asked:
            yield Stopped(step=self._kept)
            return
        begun = time.monotonic() - self._progress.elapsed_s
        last = Metrics(step=self._kept)
        for step, batch in self._batches():
            try:
                metrics, rate = yield from self._step(step, batch, stop)
            except Abandoned:
                yield from self._leave(last)
                return
            tokens = sum(len(example.ids) for example in batch)
            progress = self._advance(metrics, tokens, elapsed_s=time.monotonic() - begun)
            yield StepDone(
                metrics=metrics,
                total_steps=self._plan.total_steps,
                epoch=math.ceil(step / self._plan.steps_per_epoch),
                learning_rate=rate,
                tokens=tokens,
                elapsed_s=progress.elapsed_s,
                tokens_per_second=progress.tokens_seen / progress.elapsed_s,
            )
            last = metrics
            if stop.is_set() or self._is_checkpoint_due(step):
                yield from self._keep(metrics)
            if stop.is_set() and self._kept == step and not is_over(self._plan, self._progress):
                yield Stopped(step=step)
                return
        if self._agreement is not None:
            yield from self._agreement.check(self._kept)
        yield from finished(self._plan, self._progress)

    def _measure_start(self) -> Generator[TrainWord, None, None]:
        """Before the first step: the loss to beat. A run that goes on has it in its checkpoint."""
        if self._progress.step or not self._plan.validation.examples:
            return
        metrics = Metrics(step=0, **(yield from self._validator.measure(self._tuned, 0, epoch_end=True)))
        self._progress.base_full_valid_loss = metrics.full_valid_loss
        yield Baseline(metrics=metrics)

    def _leave(self, last: Metrics) -> Iterator[TrainWord]:
        """Keep the steps that are done; the one in progress is as if it had not begun."""
        if self._kept < last.step:
            yield from self._keep(last)
        yield Stopped(step=self._kept)

    def _batches(self) -> Iterator[tuple[int, list[TokenizedExample]]]:
        """What is left to do: the number of each step, and its batch."""
        step, per_epoch = self._progress.step, self._plan.steps_per_epoch
        for epoch in range(step // per_epoch + 1, self._spec.n_epochs + 1):
            batches = epoch_batches(
                self._plan.training.examples, self._spec.batch_size, seed=self._spec.seed, epoch=epoch
            )
            for batch in islice(batches, step % per_epoch, None):
                if is_over(self._plan, self._progress):
                    return
                step += 1
                yield step, batch

    def _step(
        self, step: int, batch: list[TokenizedExample], stop: threading.Event
    ) -> Generator[TrainWord, None, tuple[Metrics, float]]:
        rate = learning_rate_at(step, self._plan.total_steps, self._spec)
        plan = StepPlan(step=step, rate=rate, max_norm=self._spec.max_grad_norm, stop=stop)
        loss, accuracy = yield from train_step(self._tuned, self._optimizer, batch, plan)
        epoch_end = step % self._plan.steps_per_epoch == 0
        measured = yield from self._validator.measure(self._tuned, step, epoch_end=epoch_end)
        return Metrics(step=step, train_loss=loss, train_mean_token_accuracy=accuracy, **measured), rate

    def _advance(self, metrics: Metrics, tokens: int, *, elapsed_s: float) -> Progress:
        self._progress = replace(
            self._progress,
            step=metrics.step,
            tokens_seen=self._progress.tokens_seen + tokens,
            elapsed_s=elapsed_s,
            max_tokens=self._tuned.max_tokens,
            shrinks=self._tuned.shrinks,
        )
        if metrics.step % self._plan.steps_per_epoch == 0:
            self._progress = at_epoch_end(self._progress, metrics)
        return self._progress

    def _is_checkpoint_due(self, step: int) -> bool:
        interval, every_s = self._spec.checkpoint_interval, self._spec.checkpoint_every_s
        return (
            step % self._plan.steps_per_epoch == 0
            or (interval is not None and step % interval == 0)
            or (every_s is not None and time.monotonic() - self._kept_at >= every_s)
        )

    def _keep(self, metrics: Metrics) -> Iterator[TrainWord]:
        yield from Pulse(Section.CHECKPOINT, metrics.step).begin()
        self._tuned.check()
        fill = partial(self._fill, metrics=metrics)
        folder = write_checkpoint(Path(self._spec.output_dir), metrics.step, fill)
        self._kept, self._kept_at = metrics.step, time.monotonic()
        yield CheckpointReady(metrics=metrics, dir=str(folder))

    def _fill(self, folder: Path, *, metrics: Metrics) -> None:
        self._tuned.save(folder)
        self._record.write(folder, metrics, base_loss=self._progress.base_full_valid_loss)
        (folder / TRAINING_STATE).mkdir()
        save_optimizer(folder, self._optimizer, self._tuned.parameters)
        RandomState.take(self._tuned.device).save(folder)
        self._progress.write(folder, self._plan.fingerprint)


def _optimizer(parameters: list[torch.nn.Parameter], rate: float) -> torch.optim.AdamW:
    # Fused: one kernel for hundreds of small factors, where the plain loop spends more time in Python.
    return torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.999), weight_decay=WEIGHT_DECAY, fused=True)

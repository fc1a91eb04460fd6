"""What a run has come to: whether it is over, which step is its model, whether that is better than before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from app.core.failures import FailureCode
from worker.training.errors import TrainingError
from worker.training.plan import Plan
from worker.training.resume import Progress
from worker.training.words import Finished, Log, Metrics


def at_epoch_end(progress: Progress, metrics: Metrics) -> Progress:
    """With the loss on the whole validation file, None without one, noted."""
    loss, best = metrics.full_valid_loss, progress.best_full_valid_loss
    progress = replace(progress, full_valid_loss=loss)
    if loss is None or (best is not None and loss >= best):
        return progress
    return replace(progress, best_full_valid_loss=loss, best_step=metrics.step)


def is_over(plan: Plan, progress: Progress) -> bool:
    """All steps are done, or the validation loss has not fallen for as many epochs as the user will wait."""
    step, patience = progress.step, plan.spec.early_stopping_patience
    if patience is None or not plan.validation.examples or step % plan.steps_per_epoch:
        return step >= plan.total_steps
    return step >= min(plan.total_steps, (progress.best_step or 0) + patience * plan.steps_per_epoch)


def finished(plan: Plan, progress: Progress) -> Iterator[Log | Finished]:
    """The last words of a run that is over; raises TrainingError where nothing was gained.

    The tuned model is the last step's; with early stopping, whose last epochs are by definition no better,
    the best epoch's. Losses are mean nats per trained token of the whole validation file. Without one
    nothing is held out, so nothing is compared.
    """
    step, after = progress.step, progress.full_valid_loss
    if plan.spec.early_stopping_patience is not None and progress.best_step is not None:
        step, after = progress.best_step, progress.best_full_valid_loss
    before = progress.base_full_valid_loss
    if plan.spec.require_improvement and before is not None and (after is None or after >= before):
        raise _no_improvement(before, after)
    if step != plan.total_steps:
        yield Log(
            message=f"Training ended after step {progress.step} of {plan.total_steps}. The model is the "
            f"checkpoint of step {step}: no other epoch had a lower validation loss."
        )
    yield Finished(trained_tokens=progress.tokens_seen, steps=progress.step, step=step, full_valid_loss=after)


def _no_improvement(before: float, after: float | None) -> TrainingError:
    now = "not a finite number" if after is None else f"{after:.4f}"
    return TrainingError(
        FailureCode.NO_IMPROVEMENT,
        f"The tuned model is no better on the validation file: its loss is {now}, before training it was "
        f"{before:.4f}. Give more or better examples, or lower learning_rate_multiplier or n_epochs; the "
        "checkpoints of this job still answer. To keep such a model, set luthier.require_improvement to "
        "false.",
        param="validation_file",
    )

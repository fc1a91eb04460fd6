"""What a run has come to: whether its model is better than the one it began from. Knows numbers only."""

from __future__ import annotations

from app.core.failures import FailureCode
from worker.training.errors import TrainingError
from worker.training.plan import Plan
from worker.training.resume import Progress
from worker.training.words import Finished


def finished(plan: Plan, progress: Progress) -> Finished:
    """The last word of a run whose steps are done; raises TrainingError where nothing was gained.

    Losses are mean nats per trained token of the whole validation file. Without one nothing is held out,
    so nothing is compared.
    """
    before, after = progress.base_full_valid_loss, progress.full_valid_loss
    if plan.spec.require_improvement and before is not None and (after is None or after >= before):
        raise _no_improvement(before, after)
    return Finished(trained_tokens=plan.trained_tokens, steps=plan.total_steps, full_valid_loss=after)


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

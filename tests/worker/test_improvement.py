"""What a user sees of the comparison between a tuned model and the one it began from."""

from __future__ import annotations

from app.core import events
from app.core.status import JobStatus
from tests.worker.desk import Desk, examples
from worker import control
from worker.runner import Runner
from worker.trainer import Trainer

UNLIKE = examples(3).replace(b"Here.", b"#@%&~^ QZXJVK #@%&~^ QZXJVK")  # never trained, so less likely


def queue(desk: Desk, held_out: bytes, *, n_epochs: int = 3, **options: object) -> str:
    """A job that learns fast to say one thing only."""
    job_id = desk.create(
        hyperparameters={"n_epochs": n_epochs, "batch_size": 5, "learning_rate_multiplier": 1000.0},
        validation_file=desk.upload(held_out),
        luthier={"adapter": "full"} | options,
    )
    control.validate_job(desk.context, job_id)
    return job_id


def test_a_job_that_is_no_better_on_its_validation_file_fails_unless_it_need_not_be(
    desk: Desk, trainer: Trainer
) -> None:
    better, worse = queue(desk, examples(3)), queue(desk, UNLIKE)
    kept = queue(desk, UNLIKE, require_improvement=False)
    Runner(desk.context, trainer).run_waiting()
    good, bad, same = (desk.job(job_id) for job_id in (better, worse, kept))
    assert (good.status, same.status) == (JobStatus.SUCCEEDED, JobStatus.SUCCEEDED)
    before = good.luthier["base_full_valid_loss"]
    assert good.luthier["full_valid_loss"] < before
    assert desk.words(better).count(f"Before training: full validation loss={before:.2f}") == 1
    assert bad.status is JobStatus.FAILED
    assert bad.error is not None
    assert (bad.error["code"], bad.error["param"]) == ("no_improvement", "validation_file")
    assert (bad.fine_tuned_model, bad.attempt) == (None, 1)
    assert len(desk.checkpoints(worse)) == 3
    assert same.luthier["full_valid_loss"] > same.luthier["base_full_valid_loss"]


def test_a_job_that_ended_early_is_its_best_checkpoint_which_is_kept(desk: Desk, trainer: Trainer) -> None:
    options = {"require_improvement": False, "early_stopping_patience": 4}
    job_id = queue(desk, UNLIKE, n_epochs=9, **options)
    Runner(desk.context, trainer).run_waiting()
    job, kept = desk.job(job_id), desk.checkpoints(job_id)
    assert (job.status, job.error) == (JobStatus.SUCCEEDED, None)
    assert [checkpoint.step_number for checkpoint in kept] == [10, 8, 6, 2]  # epochs of two steps
    with desk.context.sessions() as session:
        best = events.find_best_checkpoint(session, job_id=job_id)
    assert best is not None
    assert best.step_number == 2
    assert job.luthier["full_valid_loss"] == best.metrics["full_valid_loss"]
    assert desk.model(job.fine_tuned_model or "").storage_key == desk.model(best.model_id).storage_key
    assert any(word.startswith("Training ended after step 10 of 18.") for word in desk.words(job_id))

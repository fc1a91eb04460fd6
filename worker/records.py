"""What an attempt leaves behind: steps, checkpoints, results. Every write asks whether it still may."""

from __future__ import annotations

import csv
import io
import shutil
from functools import partial
from pathlib import Path

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.core import attempts, events, served_models
from app.core.attempts import Attempt
from app.core.db import utc_now
from app.core.files import NewFile, create_file
from app.core.ids import Prefix, new_id
from app.core.new_weights import NewWeights, announce
from app.core.outbox import after_commit
from app.core.status import FINAL
from app.core.tables import Checkpoint, Job, Organization, TunedModel
from app.core.vocabulary import EventLevel, Purpose
from worker.context import Context
from worker.training.words import Baseline, CheckpointReady, Finished, Log, Started, StepDone

RESULT_COLUMNS = {  # OpenAI's column names, uneven as they are, and the metrics they show
    "step": "step",
    "train_loss": "train_loss",
    "train_accuracy": "train_mean_token_accuracy",
    "valid_loss": "valid_loss",
    "valid_mean_token_accuracy": "valid_mean_token_accuracy",
}


def attempt_folder(context: Context, job_id: str, attempt: int) -> Path:
    """The only folder an attempt may write to; on the same disk as the weights it publishes."""
    return context.storage.path(Attempt(job_id, attempt).folder_key)


def drop_attempt_folder(context: Context, attempt: Attempt) -> None:
    """Remove what an ended attempt did not publish."""
    shutil.rmtree(attempt_folder(context, attempt.job_id, attempt.number), ignore_errors=True)


def record_step(session: Session, attempt: Attempt, word: StepDone) -> None:
    """Metrics of a step, and when the job will end at this pace."""
    metrics = word.metrics
    left_s = word.elapsed_s / metrics.step * (word.total_steps - metrics.step)
    job = attempts.write(session, attempt, {"estimated_finish": attempts.in_seconds(left_s)})
    pace = {
        "epoch": word.epoch,
        "learning_rate": word.learning_rate,
        "tokens": word.tokens,
        "tokens_per_second": word.tokens_per_second,
    }
    data = metrics.model_dump(exclude_none=True) | {"total_steps": word.total_steps, "luthier": pace}
    events.add_metrics(session, job, message=_step_message(word), step=metrics.step, data=data)


def checkpoint_key(attempt: Attempt, word: CheckpointReady) -> str:
    """Where an attempt's checkpoint lies in storage; only its row will tell."""
    return f"weights/{attempt.job_id}-{attempt.number}-{word.metrics.step}"


def publish_checkpoint(context: Context, attempt: Attempt, word: CheckpointReady) -> None:
    """Move a whole checkpoint folder into storage."""
    context.storage.publish_dir(Path(word.dir), checkpoint_key(attempt, word))


def drop_unnamed_checkpoint(context: Context, session: Session, key: str) -> None:
    """Remove a published checkpoint unless a row names it, as after a commit whose answer was lost."""
    if session.scalar(select(TunedModel.id).where(TunedModel.storage_key == key).limit(1)) is None:
        context.storage.delete(key)


def record_checkpoint(context: Context, session: Session, attempt: Attempt, word: CheckpointReady) -> None:
    """The row and the model's name of a published checkpoint. One step has one checkpoint."""
    key = checkpoint_key(attempt, word)
    job = attempts.hold(session, attempt)
    step = word.metrics.step
    if step > (_last_step(session, job.id) or 0):
        job.deaths = 0  # progress: the job gets its tries back
    known = session.scalar(
        select(Checkpoint).where(Checkpoint.job_id == job.id, Checkpoint.step_number == step)
    )
    if known is not None:  # trained again after a crash: the newer weights stand behind the same name
        model = session.get_one(TunedModel, known.model_id)
        older, model.storage_key = model.storage_key, key
        model.purged_at = None  # where the old weights were dropped already, the new ones go the same way
        known.metrics, known.resumable = word.metrics.model_dump(), True
        if older != key:  # equal: this very record, repeated after a commit whose answer was lost
            after_commit(session, lambda: context.storage.delete(older))
        return
    name = served_models.new_model_name(job, organization_slug=_slug(session, job)) + f":ckpt-step-{step}"
    served_models.add_model(session, job, name=name, storage_key=key, is_checkpoint=True)
    session.add(
        Checkpoint(
            id=new_id(Prefix.CHECKPOINT),
            job_id=job.id,
            model_id=name,
            step_number=step,
            metrics=word.metrics.model_dump(),
            resumable=True,
        )
    )
    session.flush()
    events.add_message(session, job, f"Checkpoint created at step {step} with Snapshot ID: {name}")
    _drop_old_checkpoints(session, job.id, keep=context.settings.kept_checkpoints)


def _last_step(session: Session, job_id: str) -> int | None:
    return session.scalar(select(func.max(Checkpoint.step_number)).where(Checkpoint.job_id == job_id))


def record_start(session: Session, attempt: Attempt, word: Started, *, event_id: str) -> None:
    """Where an attempt that is not the job's first begins; said once, however often this is repeated."""
    job = attempts.hold(session, attempt)
    if job.attempt > 1:
        where = f"resumed after step {word.step}" if word.step else "started again from its beginning"
        events.add_message(session, job, f"Fine-tuning job {where} (attempt {job.attempt})", id=event_id)


def record_baseline(session: Session, attempt: Attempt, word: Baseline) -> None:
    """The loss to beat; an attempt that died before its first checkpoint may have told it already."""
    job = attempts.hold(session, attempt)
    loss = word.metrics.full_valid_loss
    if job.luthier.get("base_full_valid_loss") != loss:
        job.luthier = job.luthier | {"base_full_valid_loss": loss}
        events.add_message(session, job, f"Before training: full validation loss={_shown(loss)}")


def record_log(session: Session, attempt: Attempt, word: Log, *, event_id: str) -> None:
    """Something the trainer wants the user to know; said once, however often this is repeated."""
    job = attempts.hold(session, attempt)
    events.add_message(session, job, word.message, level=EventLevel(word.level), id=event_id)


def record_success(context: Context, session: Session, attempt: Attempt, word: Finished) -> None:
    """The results file, the model's name, and the end of the job, in one transaction."""
    job = attempts.hold(session, attempt)
    named = (Checkpoint.job_id == job.id, Checkpoint.step_number == word.step)
    made = session.scalars(select(Checkpoint).where(*named)).one()
    key = session.get_one(TunedModel, made.model_id).storage_key
    name = served_models.new_model_name(job, organization_slug=_slug(session, job))
    model = served_models.add_model(session, job, name=name, storage_key=key, is_checkpoint=False)
    result_file = _add_results(context, session, job)
    values = {
        "fine_tuned_model": name,
        "trained_tokens": word.trained_tokens,
        "result_file": result_file,
        "luthier": job.luthier | {"full_valid_loss": word.full_valid_loss},
    }
    job = attempts.succeed(session, attempt, values=values)
    events.add_message(session, job, f"New fine-tuned model created: {name}")
    events.add_message(session, job, "The job has successfully completed")
    news = NewWeights(base_model=model.base_model, tuned=served_models.weights_of(model))
    after_commit(session, partial(announce, context.redis, news))


def _add_results(context: Context, session: Session, job: Job) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(RESULT_COLUMNS)
    for row in events.list_metrics(session, job_id=job.id):
        table.writerow([row.get(metric, "") for metric in RESULT_COLUMNS.values()])
    pending = context.storage.begin()
    try:
        pending.write(text.getvalue().encode())
        new = NewFile(filename="step_metrics.csv", purpose=Purpose.FINE_TUNE_RESULTS)
        return create_file(session, context.storage, project_id=job.project_id, new=new, pending=pending).id
    finally:
        pending.discard()


def _drop_old_checkpoints(session: Session, job_id: str, *, keep: int) -> None:
    past = (
        select(TunedModel.id)
        .join(Checkpoint, Checkpoint.model_id == TunedModel.id)
        .where(Checkpoint.job_id == job_id, TunedModel.deleted_at.is_(None))
        .order_by(Checkpoint.step_number.desc())
        .offset(keep)
    )
    best = events.find_best_checkpoint(session, job_id=job_id)
    # Another job may go on from one; while it is being created it holds a lock, and the next look will do.
    locked = select(TunedModel).where(TunedModel.id.in_(past)).with_for_update(skip_locked=True)
    for model in session.scalars(locked).all():
        needs = select(Job.id).where(Job.model == model.id, Job.status.not_in(FINAL))
        is_best = best is not None and best.model_id == model.id
        if not is_best and session.scalar(needs.limit(1)) is None:
            model.deleted_at = utc_now()
    session.flush()


def _step_message(word: StepDone) -> str:
    """In the words that OpenAI's users parse."""
    metrics = word.metrics
    text = f"Step {metrics.step}/{word.total_steps}: training loss={_shown(metrics.train_loss)}"
    if metrics.valid_loss is not None:
        text += f", validation loss={_shown(metrics.valid_loss)}"
    if metrics.full_valid_loss is not None:
        text += f", full validation loss={_shown(metrics.full_valid_loss)}"
    return text


def _shown(loss: float | None) -> str:
    return "n/a" if loss is None else f"{loss:.2f}"


def _slug(session: Session, job: Job) -> str:
    return session.get_one(Organization, job.organization_id).slug

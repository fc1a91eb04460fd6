"""From a job's row to the plain data a trainer needs."""

from __future__ import annotations

from sqlalchemy.orm import Session

from app.core import hyperparameters, served_models
from app.core.base_models import find_model_dir
from app.core.tables import Job
from app.core.training_states import resume_keys
from worker.context import Context
from worker.inputs import JobInputError, find_input
from worker.records import attempt_folder
from worker.training.words import TrainSpec

_FACTORS = ("rank", "alpha", "use_rslora", "dropout", "target_modules")
_COURSE = (
    "lr_scheduler_type",
    "warmup_ratio",
    "max_grad_norm",
    "early_stopping_patience",
    "require_improvement",
)


def make_spec(context: Context, session: Session, job: Job) -> TrainSpec:
    """The spec of the job's present attempt; raises JobInputError."""
    entry = context.catalogue.find(job.base_model)
    folder = None if entry is None else find_model_dir(entry, context.settings.models_dir)
    if entry is None or folder is None:
        text = f"The weights of {job.base_model} are not on the training worker. Ask the operator for them"
        raise JobInputError(code="model_not_available", message=text, param="model")
    options = job.luthier
    numbers = job.hyperparameters
    paths = {
        param: str(find_input(context, session, file_id=getattr(job, param), param=param))
        for param in ("training_file", "validation_file")
        if getattr(job, param) is not None
    }
    return TrainSpec(
        **paths,
        job_id=job.id,
        attempt=job.attempt,
        base_model_dir=str(folder),
        chat_template=entry.chat_template,
        start_from_dir=_start_from(context, session, job),
        output_dir=str(attempt_folder(context, job.id, job.attempt)),
        adapter=options["adapter"],
        **{name: options[name] for name in (*_FACTORS, *_COURSE) if options.get(name) is not None},
        n_epochs=numbers["n_epochs"],
        batch_size=numbers["batch_size"],
        learning_rate=hyperparameters.learning_rate(
            numbers["learning_rate_multiplier"],
            base_rate=entry.learning_rate,
            adapter=options["adapter"],
        ),
        seed=job.seed,
        max_length=options["max_length"],
        max_line_bytes=context.settings.max_line_bytes,
        checkpoint_interval=options["checkpoint_interval"],
        checkpoint_every_s=context.settings.checkpoint_every_s,
        resume_from=tuple(str(context.storage.path(key)) for key in resume_keys(session, job.id)),
    )


def _start_from(context: Context, session: Session, job: Job) -> str | None:
    if job.model == job.base_model:
        return None
    row = served_models.find_weights(session, project_id=job.project_id, name=job.model)
    if row is None:
        text = f"The model {job.model} no longer exists. Create a new job on another model"
        raise JobInputError(code="model_not_available", message=text, param="model")
    return str(context.storage.path(row.storage_key))

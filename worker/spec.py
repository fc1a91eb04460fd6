"""From a job's row to the plain data a trainer needs."""

from __future__ import annotations

from sqlalchemy import select

from app.core import hyperparameters, served_models
from app.core.base_models import find_model_dir
from app.core.tables import File, Job
from worker.context import Context
from worker.records import attempt_folder
from worker.training.words import TrainSpec


class MissingInputError(Exception):
    """Something the job names is gone, as the job's error object."""

    def __init__(self, *, code: str, message: str, param: str) -> None:
        super().__init__(message)
        self.error: dict[str, str | None] = {"code": code, "message": message, "param": param}


def make_spec(context: Context, job: Job) -> TrainSpec:
    """The spec of the job's present attempt; raises MissingInputError."""
    entry = context.catalogue.find(job.base_model)
    folder = None if entry is None else find_model_dir(entry, context.settings.models_dir)
    if entry is None or folder is None:
        text = f"The weights of {job.base_model} are not on the training worker. Ask the operator for them"
        raise MissingInputError(code="model_not_available", message=text, param="model")
    options = job.luthier
    numbers = job.hyperparameters
    validation = job.validation_file
    return TrainSpec(
        job_id=job.id,
        attempt=job.attempt,
        base_model_dir=str(folder),
        chat_template=entry.chat_template,
        start_from_dir=_start_from(context, job),
        training_file=_path(context, job.training_file, "training_file"),
        validation_file=None if validation is None else _path(context, validation, "validation_file"),
        output_dir=str(attempt_folder(context, job.id, job.attempt)),
        adapter=options["adapter"],
        rank=options["rank"],
        alpha=options["alpha"],
        dropout=options["dropout"],
        target_modules=tuple(options["target_modules"]),
        n_epochs=numbers["n_epochs"],
        batch_size=numbers["batch_size"],
        learning_rate=hyperparameters.learning_rate(
            numbers["learning_rate_multiplier"], adapter=options["adapter"]
        ),
        seed=job.seed,
        max_length=options["max_length"] or min(context.settings.max_length_tokens, entry.context_length),
        checkpoint_interval=options["checkpoint_interval"],
    )


def _start_from(context: Context, job: Job) -> str | None:
    if job.model == job.base_model:
        return None
    with context.sessions() as session:
        row = served_models.find_weights(session, project_id=job.project_id, name=job.model)
    if row is None:
        text = f"The model {job.model} no longer exists. Create a new job on another model"
        raise MissingInputError(code="model_not_available", message=text, param="model")
    return str(context.storage.path(row.storage_key))


def _path(context: Context, file_id: str, param: str) -> str:
    with context.sessions() as session:
        row = session.scalar(select(File).where(File.id == file_id, File.deleted_at.is_(None)))
    if row is None or not context.storage.path(row.storage_key).exists():
        text = f"The file {file_id} no longer exists. Upload it again and create a new job"
        raise MissingInputError(code="file_not_found", message=text, param=param)
    return str(context.storage.path(row.storage_key))

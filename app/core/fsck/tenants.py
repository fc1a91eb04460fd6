"""I11: what belongs to one project is reached from no other: files, models, weights, kept answers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import aliased

from app.core.attempts import Attempt
from app.core.fsck.finding import Finding, Site
from app.core.tables import Checkpoint, File, IdempotencyKey, Job, Project, TunedModel

_STOP = "stop serving it and find out how this came about: a border between projects is broken"
_ID = re.compile(r"\b(?:ftjob-|file-)[A-Za-z0-9]{24}\b")


def check_jobs(site: Site) -> Iterator[Finding]:
    """The files and the model a job names are its project's, and so is what it made."""
    queries = [
        select(Job.id, Job.training_file.label("other")).join(File, File.id == Job.training_file),
        select(Job.id, Job.validation_file.label("other")).join(File, File.id == Job.validation_file),
        select(Job.id, Job.result_file.label("other")).join(File, File.id == Job.result_file),
    ]
    model = aliased(TunedModel)
    made = select(Job.id, TunedModel.id.label("other")).join(TunedModel, TunedModel.job_id == Job.id)
    start = select(Job.id, Job.model.label("other")).join(model, model.id == Job.model)
    owner = select(Job.id, Job.organization_id.label("other")).join(Project, Project.id == Job.project_id)
    foreign = [
        *(query.where(File.project_id != Job.project_id) for query in queries),
        made.where(TunedModel.project_id != Job.project_id),
        start.where(model.project_id != Job.project_id),
        owner.where(Project.organization_id != Job.organization_id),
    ]
    with site.snapshot() as session:
        for query in foreign:
            for row in session.execute(query):
                yield Finding("I11", row.id, f"{row.other} belongs to another project than the job", _STOP)


def check_weights(site: Site) -> Iterator[Finding]:
    """A storage key is one project's, and the weights of a name were made by that name's job."""
    shared = (
        select(TunedModel.storage_key)
        .group_by(TunedModel.storage_key)
        .having(func.count(func.distinct(TunedModel.project_id)) > 1)
    )
    mixed = (
        select(Checkpoint.id, TunedModel.id.label("model"))
        .join(TunedModel, TunedModel.id == Checkpoint.model_id)
        .where(TunedModel.job_id != Checkpoint.job_id)
    )
    doubled = select(File.storage_key).group_by(File.storage_key).having(func.count() > 1)
    with site.snapshot() as session:
        for key in session.scalars(shared):
            yield Finding("I11", key, "holds weights of more than one project", _STOP)
        for key in session.scalars(doubled):
            yield Finding("I11", key, "holds the bytes of more than one file", _STOP)
        for row in session.execute(mixed):
            yield Finding("I11", row.id, f"{row.model} was made by another job than its checkpoint", _STOP)
        names = select(TunedModel.id, TunedModel.job_id, TunedModel.storage_key)
        for name in session.execute(names).yield_per(1000):
            attempt = Attempt.of_folder(name.storage_key.rpartition("/")[2])
            if attempt is not None and attempt.job_id != name.job_id:
                yield Finding("I11", name.id, f"answers with weights made by {attempt.job_id}", _STOP)


def check_answers(site: Site) -> Iterator[Finding]:
    """An answer kept for a repeated request names nothing of another project."""
    with site.snapshot() as session:
        owners = _owners(session.execute(select(Job.id, Job.project_id)))
        owners |= _owners(session.execute(select(File.id, File.project_id)))
        columns = (IdempotencyKey.project_id, IdempotencyKey.key, IdempotencyKey.response)
        for row in session.execute(select(*columns)).yield_per(1000):
            for name in set(_ID.findall(json.dumps(row.response))):
                if owners.get(name, row.project_id) != row.project_id:
                    subject = f"Idempotency-Key of {row.project_id}"
                    yield Finding("I11", subject, f"its answer names {name} of another project", _STOP)


def _owners(rows: Any) -> dict[str, str]:
    return {str(name): str(project_id) for name, project_id in rows}

"""I5: a model that has a name can answer: its folder is there, whole as it was written, and can be read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from app.core import manifest
from app.core.completions import WeightsKind
from app.core.db import utc_now
from app.core.fsck.finding import BUG, HOUSEKEEPING, Finding, Severity, Site, remove
from app.core.manifest import DamagedError
from app.core.status import FINAL, JobStatus
from app.core.tables import Checkpoint, File, Job, TunedModel
from app.core.tensors import check_header


def check_models(site: Site) -> Iterator[Finding]:
    """I5: the weights of every live name, checkpoints too, are whole and of their kind."""
    columns = (TunedModel.id, TunedModel.storage_key, TunedModel.kind)
    with site.snapshot() as session:
        rows = session.execute(select(*columns).where(TunedModel.deleted_at.is_(None))).all()
    for row in rows:
        problem = damage(site, row.storage_key, kind=row.kind)
        if problem is not None:
            cure = f"bring {row.storage_key} back from a copy, or delete the model and train it again"
            yield Finding("I5", row.id, f"cannot answer: {problem}", cure)


def check_successes(site: Site) -> Iterator[Finding]:
    """I5: a job that succeeded names a model of its own and its results, be they deleted since."""
    query = (
        select(Job.id, Job.fine_tuned_model, TunedModel.id.label("model"), File.id.label("results"))
        .outerjoin(TunedModel, (TunedModel.id == Job.fine_tuned_model) & (TunedModel.job_id == Job.id))
        .outerjoin(File, File.id == Job.result_file)
        .where(Job.status == JobStatus.SUCCEEDED)
    )
    with site.snapshot() as session:
        for job in session.execute(query).yield_per(1000):
            if job.model is None:
                yield Finding(
                    "I5", job.id, f"succeeded, but its model {job.fine_tuned_model} has no row", BUG
                )
            if job.results is None:
                yield Finding("I5", job.id, "succeeded, but its results file has no row", BUG)


def check_resumes(site: Site) -> Iterator[Finding]:
    """I5: a checkpoint said to be resumable holds its whole training state; an ended job needs none."""
    query = (
        select(Checkpoint.id, Checkpoint.model_id, TunedModel.storage_key, TunedModel.kind, Job.status)
        .join(TunedModel, TunedModel.id == Checkpoint.model_id)
        .join(Job, Job.id == Checkpoint.job_id)
        .where(Checkpoint.resumable, TunedModel.deleted_at.is_(None))
    )
    with site.snapshot() as session:
        rows = session.execute(query).all()
    for row in rows:
        problem = damage(site, row.storage_key, kind=row.kind, with_state=True)
        repair = partial(_end_resumable, checkpoint_id=row.id)
        if row.status in FINAL:  # nobody will resume from it; housekeeping may be in the midst of it
            problem = f"its job has {row.status}, and its training state is not settled yet"
            yield Finding("I10", row.model_id, problem, HOUSEKEEPING, Severity.WARNING)
        elif problem is not None:
            cure = "mark it as not resumable; the job goes on from an older one"
            yield Finding("I5", row.model_id, f"cannot be resumed: {problem}", cure, repair=repair)


def check_states(site: Site) -> Iterator[Finding]:
    """I10: no training state is kept in folders that no checkpoint resumes from."""
    resumable = func.bool_or(func.coalesce(Checkpoint.resumable, False))
    query = (
        select(TunedModel.storage_key, resumable.label("resumable"))
        .outerjoin(Checkpoint, Checkpoint.model_id == TunedModel.id)
        .where(TunedModel.purged_at.is_(None))
        .group_by(TunedModel.storage_key)
    )
    with site.snapshot() as session:
        rows = session.execute(query).all()
    for row in rows:
        folder = site.storage.root / row.storage_key / manifest.TRAINING_STATE
        if not row.resumable and folder.is_dir():
            repair = partial(_drop_state, site=site, key=row.storage_key)
            problem = "keeps a training state that nothing resumes from"
            yield Finding("I10", row.storage_key, problem, "delete it", Severity.WARNING, repair)


def check_gone(site: Site) -> Iterator[Finding]:
    """Deleted models whose weights are gone already only need their row to say so."""
    query = select(TunedModel.id, TunedModel.storage_key).where(
        TunedModel.deleted_at.is_not(None), TunedModel.purged_at.is_(None)
    )
    with site.snapshot() as session:
        rows = session.execute(query).all()
    for row in rows:
        if (site.storage.root / row.storage_key).exists():
            problem = "deleted, its weights not yet"
            yield Finding("I10", row.id, problem, HOUSEKEEPING, Severity.WARNING)
        else:
            repair = partial(_mark_purged, model_id=row.id)
            problem = "deleted, its weights gone"
            yield Finding("I10", row.id, problem, "mark it purged", Severity.WARNING, repair)


def damage(site: Site, key: str, *, kind: WeightsKind, with_state: bool = False) -> str | None:
    """Why the folder of a model cannot be used; None when all is well."""
    try:
        folder = site.storage.path(key)
        if not folder.is_dir():
            return f"its folder {key} is gone"
        mark = (key, kind, with_state, *_signature(folder))
        if mark not in site.seen:
            site.seen[mark] = _damage(folder, kind, with_state=with_state, quick=site.quick)
        return site.seen[mark]
    except ValueError:
        return f"its storage key {key[:80]!r} is none"
    except OSError as error:
        return f"its folder {key} cannot be read: {error.strerror}"


def _damage(folder: Path, kind: WeightsKind, *, with_state: bool, quick: bool) -> str | None:
    try:
        manifest.verify(folder, with_state=with_state, quick=quick)
        config = "adapter_config.json" if kind is WeightsKind.LORA else "config.json"
        _check_json(folder / config)
        tensors = sorted(folder.glob("*.safetensors"))
        if not tensors:
            raise DamagedError("it holds no weights")
        for path in tensors:
            check_header(path)
    except DamagedError as error:
        return str(error)
    return None


def _check_json(path: Path) -> None:
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            raise DamagedError(f"{path.name} is missing")
        if not isinstance(json.loads(path.read_bytes()), dict):
            raise ValueError("no object")
    except (OSError, ValueError, RecursionError):
        raise DamagedError(f"{path.name} cannot be read") from None


def _signature(folder: Path) -> tuple[tuple[str, int, int], ...]:
    found = ((path, path.lstat()) for path in sorted(folder.rglob("*")))
    return tuple((str(path), status.st_size, status.st_mtime_ns) for path, status in found)


def _end_resumable(session: Session, *, checkpoint_id: str) -> bool:
    change = update(Checkpoint).where(Checkpoint.id == checkpoint_id, Checkpoint.resumable)
    return bool(session.scalar(change.values(resumable=False).returning(Checkpoint.id)))


def _drop_state(session: Session, *, site: Site, key: str) -> bool:
    """Nothing makes a checkpoint resumable again, so a look under the lock is enough."""
    resumable = (
        select(Checkpoint.id)
        .join(TunedModel, TunedModel.id == Checkpoint.model_id)
        .where(TunedModel.storage_key == key, Checkpoint.resumable)
    )
    if session.scalar(resumable.limit(1)) is not None:
        return False
    return remove(site.storage.root / key / manifest.TRAINING_STATE)


def _mark_purged(session: Session, *, model_id: str) -> bool:
    gone = (TunedModel.id == model_id, TunedModel.deleted_at.is_not(None), TunedModel.purged_at.is_(None))
    change = update(TunedModel).where(*gone).values(purged_at=utc_now()).returning(TunedModel.id)
    return bool(session.scalar(change))

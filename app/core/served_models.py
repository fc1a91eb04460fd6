"""A model's name → what answers for it. Lists, deletes, and gives tuned models their names."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from app.core.base_models import BaseModelEntry, Catalogue
from app.core.completions import TunedWeights, WeightsKind
from app.core.db import utc_now
from app.core.errors import InvalidRequest, NotFound
from app.core.ids import random_name
from app.core.status import FINAL
from app.core.storage import Storage
from app.core.tables import Job, TunedModel

DEFAULT_RANK = 16
DEFAULT_MAX_LENGTH = 2048  # tokens of one example
_SHAPE = ("adapter", "rank", "alpha", "use_rslora", "target_modules")  # of the model a job goes on from


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A name as the models list shows it, with what an engine needs to answer."""

    id: str
    base_model: str
    created_at: datetime
    owned_by: str
    tuned: TunedWeights | None = None


@dataclass(frozen=True, slots=True)
class Start:
    """Where a new job begins: a base model, or a tuned one with the options it was made with."""

    base_model: str
    entry: BaseModelEntry
    options: dict[str, Any] | None = None


def list_models(session: Session, catalogue: Catalogue, *, project_id: str) -> list[ServedModel]:
    """Base models, then the project's tuned models, newest first; checkpoints are found by name only."""
    query = (
        _live(project_id).where(TunedModel.is_checkpoint.is_(False)).order_by(TunedModel.created_at.desc())
    )
    tuned = [_served(row) for row in session.scalars(query)]
    return [_base(entry) for entry in catalogue.entries.values()] + tuned


def resolve(session: Session, catalogue: Catalogue, *, project_id: str, name: str) -> ServedModel:
    """The model of that name, if this project may use it."""
    entry = catalogue.find(name)
    if entry is not None:
        return _base(entry)
    row = session.scalar(_live(project_id).where(TunedModel.id == name))
    if row is None or catalogue.find(row.base_model) is None:
        raise NotFound(
            f"The model '{name[:200]}' does not exist or you do not have access to it.",
            code="model_not_found",
            param="model",
        )
    return _served(row)


def find_start(session: Session, catalogue: Catalogue, *, project_id: str, name: str) -> Start | None:
    """Where a job on `name` begins; a tuned model is locked so that it outlives the job's creation."""
    entry = catalogue.find(name)
    if entry is not None:
        return Start(entry.name, entry)
    row = session.scalar(_live(project_id).where(TunedModel.id == name).with_for_update(read=True))
    entry = None if row is None else catalogue.find(row.base_model)
    if row is None or entry is None:
        return None
    options = session.scalar(select(Job.luthier).where(Job.id == row.job_id))
    return Start(row.base_model, entry, options)


def training_options(start: Start, asked: dict[str, Any]) -> dict[str, Any]:
    """The job's `luthier` object: what was asked, defaults filled in."""
    inherited = {key: start.options.get(key) for key in _SHAPE} if start.options else {}
    if inherited:
        _check_room(inherited, asked)
        if inherited["rank"] and "rank" in asked:  # at the same scale, alpha / rank
            more = asked["rank"] / inherited["rank"]
            inherited["alpha"] *= more**0.5 if inherited["use_rslora"] else more
    longest = start.entry.context_length
    if asked.get("max_length", 0) > longest:
        raise InvalidRequest(
            f"luthier.max_length must be at most {longest}, the context length of {start.base_model}.",
            param="luthier.max_length",
            code="integer_above_max_value",
        )
    adapter = asked.get("adapter", inherited.get("adapter", start.entry.adapter))
    defaults = _no_factors(asked) if adapter == "full" else _factors(start.entry, asked | inherited)
    defaults |= {
        "adapter": adapter,
        "max_length": min(DEFAULT_MAX_LENGTH, longest),
        "checkpoint_interval": None,
        "lr_scheduler_type": "linear",
        "warmup_ratio": 0.05,
        "max_grad_norm": 1.0,
        "early_stopping_patience": None,
        "require_improvement": True,
        "priority": 0,
    }
    return defaults | inherited | asked


def _check_room(old: dict[str, Any], asked: dict[str, Any]) -> None:
    """Refuse what would not hold the tuned adapter, which the new one begins as."""
    modules, wanted = old["target_modules"], asked.get("target_modules")
    if asked.get("adapter", old["adapter"]) != old["adapter"]:
        raise _no_room("adapter", f"must be {old['adapter']!r}")
    if old["rank"] is not None and asked.get("rank", old["rank"]) < old["rank"]:
        raise _no_room("rank", f"must be at least {old['rank']}")
    if old["rank"] is not None and wanted is not None and not set(modules or [""]) <= set(wanted):
        named = "all linear layers: leave it out" if modules is None else ", ".join(modules)
        raise _no_room("target_modules", f"must hold {named}")


def _no_room(option: str, what: str) -> InvalidRequest:
    return InvalidRequest(
        f"luthier.{option} {what}. A job that goes on from a tuned model begins as exactly that model.",
        param=f"luthier.{option}",
        code="invalid_value",
    )


def _factors(entry: BaseModelEntry, given: dict[str, Any]) -> dict[str, Any]:
    rank = given.get("rank", DEFAULT_RANK)
    modules = list(entry.target_modules) or None  # None: all linear layers of the blocks
    return {"rank": rank, "alpha": 2 * rank, "use_rslora": False, "dropout": 0.0, "target_modules": modules}


def _no_factors(asked: dict[str, Any]) -> dict[str, Any]:
    """What only LoRA has, as null; asking for it beside `full` is a mistake."""
    names = ("rank", "alpha", "use_rslora", "dropout", "target_modules")
    for name in names:
        if asked.get(name) is not None:
            raise InvalidRequest(
                f"luthier.{name} has no meaning with luthier.adapter 'full'. Leave it out.",
                param=f"luthier.{name}",
                code="invalid_value",
            )
    return dict.fromkeys(names)


def delete_model(session: Session, catalogue: Catalogue, *, project_id: str, name: str) -> str:
    """Remove a tuned model of the project; its weights go once no other name needs them."""
    if catalogue.find(name) is not None:
        raise InvalidRequest(f"{name} is a base model; only tuned models can be deleted.", param="model")
    row = session.scalar(_live(project_id).where(TunedModel.id == name).with_for_update())
    if row is None:
        raise NotFound(f"The model '{name[:200]}' does not exist", code="model_not_found", param="model")
    needs = (Job.model == name) | (Job.id == row.job_id)  # goes on from it, or is still making it
    user = session.scalar(select(Job.id).where(needs, Job.status.not_in(FINAL)).limit(1))
    if user is not None:
        raise InvalidRequest(
            f"{name} is in use by job {user}, which is not finished. Cancel the job or wait for its end.",
            code="model_in_use",
            param="model",
        )
    row.deleted_at = utc_now()
    return row.id


def purge_deleted(session: Session, storage: Storage) -> int:
    """Remove weights that no live name needs; returns how many names were settled."""
    rows = session.scalars(
        select(TunedModel)
        .where(TunedModel.deleted_at.is_not(None), TunedModel.purged_at.is_(None))
        .limit(100)
    ).all()
    settled = [row for row in rows if _is_shared(session, row) or storage.delete(row.storage_key)]
    for row in settled:
        row.purged_at = utc_now()
    return len(settled)


def _is_shared(session: Session, row: TunedModel) -> bool:
    live = select(TunedModel.id).where(
        TunedModel.storage_key == row.storage_key, TunedModel.deleted_at.is_(None)
    )
    return session.scalar(live.limit(1)) is not None


def new_model_name(job: Job, *, organization_slug: str) -> str:
    """`ft:base:org:suffix:uid`; without a suffix its place stays empty."""
    return f"ft:{job.base_model}:{organization_slug}:{job.suffix or ''}:{random_name(8)}"


def add_model(session: Session, job: Job, *, name: str, storage_key: str, is_checkpoint: bool) -> TunedModel:
    """Give weights in storage a name that answers in chat."""
    kind = WeightsKind.FULL if job.luthier["adapter"] == "full" else WeightsKind.LORA
    row = TunedModel(
        id=name,
        project_id=job.project_id,
        job_id=job.id,
        base_model=job.base_model,
        kind=kind,
        storage_key=storage_key,
        is_checkpoint=is_checkpoint,
    )
    session.add(row)
    session.flush()
    return row


def weights_of(row: TunedModel) -> TunedWeights:
    """What an engine loads for it; names of the same weights share them."""
    return TunedWeights(id=row.storage_key.rpartition("/")[2], kind=row.kind, path=row.storage_key)


def find_weights(session: Session, *, project_id: str, name: str) -> TunedModel | None:
    """The live tuned model of that name."""
    return session.scalar(_live(project_id).where(TunedModel.id == name))


def _base(entry: BaseModelEntry) -> ServedModel:
    return ServedModel(entry.name, entry.name, datetime(2024, 10, 31, tzinfo=UTC), "luthier")


def _served(row: TunedModel) -> ServedModel:
    return ServedModel(row.id, row.base_model, row.created_at, row.project_id, weights_of(row))


def _live(project_id: str) -> Select[TunedModel]:
    return select(TunedModel).where(TunedModel.project_id == project_id, TunedModel.deleted_at.is_(None))

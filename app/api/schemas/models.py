"""Models as they leave."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from app.core.served_models import ServedModel


class ModelObject(BaseModel):
    """A name that answers in chat."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelList(BaseModel):
    """All models at once: this list has no pages."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


class ModelDeleted(BaseModel):
    """Confirmation that a model is gone."""

    id: str
    object: Literal["model"] = "model"
    deleted: bool = True


def model_object(model: ServedModel) -> ModelObject:
    """A model as the client sees it."""
    return ModelObject(id=model.id, created=int(model.created_at.timestamp()), owned_by=model.owned_by)

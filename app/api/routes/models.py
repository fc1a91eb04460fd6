"""/v1/models: list, get, delete. Names may hold ':' and, sent as %2F, '/'."""

from __future__ import annotations

from fastapi import APIRouter

from app.api.dependencies import CallerDep, ContextDep, SessionDep
from app.api.schemas.fields import Id
from app.api.schemas.models import ModelDeleted, ModelList, ModelObject, model_object
from app.core import served_models

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("")
def list_models(caller: CallerDep, context: ContextDep, session: SessionDep) -> ModelList:
    """List base models and the project's tuned models."""
    found = served_models.list_models(session, context.catalogue, project_id=caller.project_id)
    return ModelList(data=[model_object(model) for model in found])


@router.get("/{model:path}")
def retrieve_model(model: Id, caller: CallerDep, context: ContextDep, session: SessionDep) -> ModelObject:
    """Get a model."""
    found = served_models.resolve(session, context.catalogue, project_id=caller.project_id, name=model)
    return model_object(found)


@router.delete("/{model:path}")
def delete_model(model: Id, caller: CallerDep, context: ContextDep, session: SessionDep) -> ModelDeleted:
    """Delete a tuned model that no unfinished job goes on from."""
    name = served_models.delete_model(session, context.catalogue, project_id=caller.project_id, name=model)
    return ModelDeleted(id=name)

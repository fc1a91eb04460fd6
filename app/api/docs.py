"""The description of the API: openapi.json, and one plain page made of it without any script."""

from __future__ import annotations

from html import escape
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse
from pydantic.json_schema import models_json_schema

from app.api.schemas.chat import CreateChatCompletion
from app.api.schemas.completions import CreateCompletion
from app.api.schemas.jobs import CreateJob
from app.api.schemas.responses import CreateResponse
from app.api.schemas.stored_completions import ChangeCompletion

router = APIRouter(include_in_schema=False)
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "code{background:#8882;padding:.1em .3em}h2{margin-top:2rem}td{padding:.1rem 1rem .1rem 0}"
)
_HEADERS = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}


@router.get("/openapi.json")
def openapi_json(request: Request) -> dict[str, Any]:
    """The API as OpenAPI 3.1."""
    description: dict[str, Any] = request.app.openapi()
    return description


@router.get("/docs")
def docs(request: Request) -> HTMLResponse:
    """The API for people."""
    description = request.app.openapi()
    body = "".join(
        _operation(method.upper(), path, operation)
        for path, methods in description["paths"].items()
        for method, operation in methods.items()
    )
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Luthier API</title><style>{_STYLE}</style>"
        f"<h1>Luthier API</h1><p>{escape(description['info']['description'])} "
        f"<a href=/openapi.json>openapi.json</a></p>{body}"
    )
    return HTMLResponse(page, headers=_HEADERS)


def describe(app: FastAPI) -> dict[str, Any]:
    """The schema, with the bodies that routes parse themselves. Made once."""
    if app.openapi_schema is None:
        schema = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        _, bodies = models_json_schema(
            [
                (CreateJob, "validation"),
                (CreateChatCompletion, "validation"),
                (CreateCompletion, "validation"),
                (ChangeCompletion, "validation"),
                (CreateResponse, "validation"),
            ],
            ref_template="#/components/schemas/{model}",
        )
        schema["components"] = schema.get("components", {})
        schema["components"].setdefault("schemas", {}).update(bodies["$defs"])
        schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"key": []}]
        app.openapi_schema = schema
    return app.openapi_schema


def _operation(method: str, path: str, operation: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(item['name'])}</code><td>in {escape(item['in'])}"
        for item in operation.get("parameters", [])
    )
    text = escape(operation.get("description", ""))
    return f"<h2><code>{method} {escape(path)}</code></h2><p>{text}</p><table>{rows}</table>"

"""JSON bodies: read after the caller is known, parsed strictly, checked against their schema.

FastAPI's own parsing would read the body before any dependency runs and let NaN, duplicate keys and
lone surrogates through.
"""

from __future__ import annotations

import hashlib
from typing import Any, Generic, TypeVar

from anyio import to_thread
from fastapi import Request
from pydantic import BaseModel, ValidationError

from app.api.faults import kind_of, shown, to_invalid_request
from app.core.errors import InvalidRequest
from app.core.json_text import JsonError, parse_json

Model = TypeVar("Model", bound=BaseModel)
INLINE_BYTES = 64 * 1024  # larger bodies are parsed in a thread: a second of parsing stops all streams


class JsonBody(Generic[Model]):
    """A dependency that gives the body as a `Model`."""

    def __init__(self, model: type[Model]) -> None:
        self.model = model

    async def __call__(self, request: Request) -> Model:
        """Read, parse and check; raises InvalidRequest."""
        _check_content_type(request.headers.get("content-type"))
        text = await request.body()
        request.state.body_digest = hashlib.sha256(text).hexdigest()
        if len(text) <= INLINE_BYTES:
            return self._parse(text)
        return await to_thread.run_sync(self._parse, text)

    def _parse(self, text: bytes) -> Model:
        if not text:
            raise InvalidRequest("The request has no body. Send a JSON object.", code="invalid_json")
        try:
            value = parse_json(text)
        except JsonError as error:
            raise InvalidRequest(
                f"We could not parse the JSON body of your request: {error}.", code="invalid_json"
            ) from None
        if not isinstance(value, dict):
            raise InvalidRequest(
                f"The JSON body must be an object, but it is {kind_of(value)}.", code="invalid_type"
            )
        try:
            return self.model.model_validate(value)
        except ValidationError as error:
            raise to_invalid_request(error.errors(include_url=False)) from None


def json_request(model: type[BaseModel]) -> dict[str, Any]:
    """What the API's description says of a route that takes this body."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _check_content_type(content_type: str | None) -> None:
    kind = (content_type or "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise InvalidRequest(
            "This method only accepts 'application/json' requests, but you specified the header "
            f"'Content-Type: {shown(content_type)}'.",
            code="unsupported_content_type",
        )

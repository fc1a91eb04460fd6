"""Idempotency-Key for routes that create: the same request sent again gets the first one's answer.

A route asks for `OnceDep` and returns `once(session, create)`; without the header it just creates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from fastapi import Depends, Request, Response
from pydantic import BaseModel
from sqlalchemy.orm import Session

from app.api.dependencies import CallerDep
from app.core.errors import InvalidRequest
from app.core.idempotency import Asked, check_key, find_answer, fingerprint, keep_answer

HEADER = "idempotency-key"
REPLAYED = {"idempotent-replayed": "true"}


class Once:
    """One request with its key, if it brought one."""

    def __init__(self, request: Request, *, project_id: str) -> None:
        keys = request.headers.getlist(HEADER)
        if len(keys) > 1:
            raise InvalidRequest("The header Idempotency-Key is there twice.", code="invalid_idempotency_key")
        self._key = check_key(keys[0]) if keys else None
        self._request = request
        self._project_id = project_id

    def __call__(
        self, session: Session, create: Callable[[], BaseModel], *, body_digest: str | None = None
    ) -> Response:
        """The answer of `create`, or the one it had before. `body_digest`: of a body that is no JSON."""
        if self._key is None:
            return json_response(create())
        asked = self._asked(self._key, body_digest or self._request.state.body_digest)
        kept = find_answer(session, asked)
        if kept is not None:
            return _response(kept["body"], status=kept["status"], headers=REPLAYED)
        text = _text(create())
        keep_answer(session, asked, {"status": 200, "body": text})
        return _response(text)

    def _asked(self, key: str, body_digest: str) -> Asked:
        url = self._request.url
        return Asked(
            self._project_id, key, fingerprint(self._request.method, url.path, url.query, body_digest)
        )


def json_response(created: BaseModel) -> Response:
    """An object as a client gets it."""
    return _response(_text(created))


def _text(created: BaseModel) -> str:
    return created.model_dump_json(by_alias=True)


def _response(text: str, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(text, status_code=status, media_type="application/json", headers=headers)


async def _get_once(request: Request, caller: CallerDep) -> Once:
    return Once(request, project_id=caller.project_id)


OnceDep = Annotated[Once, Depends(_get_once)]

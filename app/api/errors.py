"""Every failure as OpenAI's envelope: all four keys, the right status, nothing of the inside."""

from __future__ import annotations

import logging

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DataError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from app.api.faults import shown, to_invalid_request
from app.api.outages import find_outage
from app.core.errors import InvalidRequest, ServiceError

log = logging.getLogger(__name__)
CLIENT_GONE = 499  # nginx's number; nobody is left to read it


class ClientGone(Exception):
    """The client left before its answer."""


class BodyTimeout(ServiceError):
    """The client stopped sending in the middle of its body."""

    status = 408
    type = "invalid_request_error"


def envelope(error: ServiceError) -> JSONResponse:
    """The answer to a failed request."""
    body = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    headers = dict(error.headers)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse({"error": body}, status_code=error.status, headers=headers)


def last_resort(error: Exception) -> JSONResponse:
    """The answer to a failure no route expected: come back later, or a bug of ours."""
    outage = find_outage(error)
    if outage is not None:
        cause = getattr(error, "orig", None) or error
        log.error("%s: %s", type(cause).__module__.partition(".")[0], type(cause).__name__)
        return envelope(outage)
    log.error("unexpected failure", exc_info=error)
    return envelope(ServiceError("The server had an error while processing your request. Please try again."))


def install(app: FastAPI) -> None:
    """Register the handlers. Exceptions none of them knows end in the middleware, as outages do."""
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_exception_handler(DataError, _data_error)
    app.add_exception_handler(ClientGone, _client_gone)
    app.add_exception_handler(ClientDisconnect, _client_gone)


def _service_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    return envelope(error)


def _validation_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    errors = error.errors()
    return envelope(to_invalid_request(errors, inside=str(errors[0]["loc"][0])))


def _http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {shown(request.url.path, length=200)}"
    if error.status_code == 405:
        allowed = ", ".join(_allowed_methods(request))
        failure = _with_status(405, f"Not allowed: {what}. Allowed here: {allowed}.", "method_not_supported")
        response = envelope(failure)
        response.headers["allow"] = allowed
        return response
    if error.status_code == 404:
        text = f"Unknown request URL: {what}. Check it for typos; GET /docs lists what there is."
        return envelope(_with_status(404, text, "unknown_url"))
    return envelope(_with_status(error.status_code, str(error.detail), None))


def _with_status(status: int, message: str, code: str | None) -> ServiceError:
    error = InvalidRequest(message, code=code)
    error.status = status
    return error


def _allowed_methods(request: Request) -> list[str]:
    """Methods of all routes on this path; Starlette itself knows only those of the first."""
    return [
        method
        for method in ("DELETE", "GET", "PATCH", "POST", "PUT")
        if any(
            route.matches({**request.scope, "method": method})[0] is Match.FULL
            for route in request.app.routes
        )
    ]


def _data_error(_request: Request, error: Exception) -> Response:
    log.warning("the database refused a value: %s", type(error).__name__)
    return envelope(InvalidRequest("A value of the request cannot be stored.", code="invalid_value"))


def _client_gone(_request: Request, _error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)

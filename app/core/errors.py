"""The errors a client may see, each with OpenAI's type and code and its HTTP status.

    ServiceError
    ├── InvalidRequest        400  the request is wrong; `param` says where
    ├── InvalidKey            401  no key, or one that is not valid
    ├── NotFound              404  absent, or of another project: the answer is the same
    ├── KeyInUse              409  a request with the same Idempotency-Key is under way
    ├── TooLarge              413  more bytes than the limit
    ├── KeyReused             422  the Idempotency-Key stands for another request
    ├── StorageFull           507  the disk has no room
    └── Unavailable           503  try again after `retry_after_s`

Messages name the field and the cure and hold nothing of the inside.
"""

from __future__ import annotations


class ServiceError(Exception):
    """An expected failure with everything its answer needs."""

    status = 500
    type = "server_error"

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.param = param

    @property
    def headers(self) -> dict[str, str]:
        """Headers the answer carries beside its body."""
        return {}


class InvalidRequest(ServiceError):
    """The request cannot be done as it was asked."""

    status = 400
    type = "invalid_request_error"


class InvalidKey(ServiceError):
    """The API key is missing, unknown or revoked."""

    status = 401
    type = "invalid_request_error"

    def __init__(self, message: str) -> None:
        super().__init__(message, code="invalid_api_key")


class NotFound(ServiceError):
    """No such thing in this project."""

    status = 404
    type = "invalid_request_error"


class KeyInUse(ServiceError):
    """A request with the same Idempotency-Key is under way; the official client comes back by itself."""

    status = 409
    type = "invalid_request_error"

    def __init__(self, message: str) -> None:
        super().__init__(message, code="idempotency_key_in_use")

    @property
    def headers(self) -> dict[str, str]:
        """Tells the client when to come back."""
        return {"retry-after": "1"}


class KeyReused(ServiceError):
    """The Idempotency-Key was given to another request before."""

    status = 422
    type = "invalid_request_error"

    def __init__(self, message: str) -> None:
        super().__init__(message, code="idempotency_key_reused")


class TooLarge(ServiceError):
    """The body is larger than the limit."""

    status = 413
    type = "invalid_request_error"


class StorageFull(ServiceError):
    """There is no room for the bytes."""

    status = 507
    type = "server_error"


class Unavailable(ServiceError):
    """The service cannot do this now."""

    status = 503
    type = "server_error"

    def __init__(self, message: str, *, code: str = "service_unavailable", retry_after_s: int = 5) -> None:
        super().__init__(message, code=code)
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        """Tells the client when to come back."""
        return {"retry-after": str(self.retry_after_s)}

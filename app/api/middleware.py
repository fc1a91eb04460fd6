"""The edge of the service, in plain ASGI: request ids, headers, one log line, limits of bodies, last resort.

Works on streams too: nothing is collected. Knows no route but the one that takes files.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.errors import CLIENT_GONE, BodyTimeout, envelope, last_resort
from app.core.errors import InvalidRequest, TooLarge
from app.core.ids import Prefix, new_id
from app.core.log import bind
from app.core.settings import Settings

log = logging.getLogger(__name__)

UPLOAD_PATH = "/v1/files"
FORM_BYTES = 64 * 1024  # of an upload, beside its file
BODY_GAP_S = 20.0  # a client that sends nothing for so long is cut off
BODY_RATE = 1000  # bytes a second, beyond the first gap; who sends less only holds a place
LINGER_S = 20.0  # how long a refused body is still read, so that the client gets to read the answer


class Edge:
    """Wraps the application; one `_Exchange` for each request."""

    def __init__(self, app: ASGIApp, *, settings: Settings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send, limit=self._limit(scope))
        with bind(request_id=exchange.request_id):
            await exchange.run(self._app)

    def _limit(self, scope: Scope) -> int:
        if scope["path"] == UPLOAD_PATH:
            return self._settings.max_file_bytes + FORM_BYTES
        return self._settings.max_body_bytes


class _Exchange:
    """One request and its response."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, *, limit: int) -> None:
        self.request_id = new_id(Prefix.REQUEST)
        self._scope, self._receive, self._send = scope, receive, send
        self._limit = limit
        self._started_at = time.perf_counter()
        self._headers = Headers(scope=scope)
        self._seen = 0  # bytes of the body
        self._waited_s = 0.0  # for them
        self._more = self._headers.get("content-length", "0") != "0" or "transfer-encoding" in self._headers
        self._status = 0

    async def run(self, app: ASGIApp) -> None:
        """Answer, whatever happens."""
        try:
            self._check_length()
            await app(self._scope, self.receive, self.send)
        except (TooLarge, InvalidRequest) as error:
            await envelope(error)(self._scope, self.receive, self.send)
        except Exception as error:
            answer = last_resort(error)
            if not self._status:
                await answer(self._scope, self.receive, self.send)
        finally:
            self._log()

    def _check_length(self) -> None:
        text = self._headers.get("content-length")
        if text is None:
            return
        if not (text.isascii() and text.isdigit()):
            raise InvalidRequest("The Content-Length header is not a number.")
        if len(text) > 18 or int(text) > self._limit:
            raise self._too_large()

    def _too_large(self) -> TooLarge:
        file = self._scope["path"] == UPLOAD_PATH
        limit = self._limit - FORM_BYTES if file else self._limit
        what = "file is" if file else "request body is"
        return TooLarge(
            f"The {what} too large: at most {limit} bytes ({limit / 2**20:.3g} MB) are allowed.",
            code="file_too_large" if file else "request_too_large",
            param="file" if file else None,
        )

    async def receive(self) -> Message:
        """The next piece of the body, counted; a body may neither pause for long nor trickle."""
        if not self._more:
            return await self._receive()
        credit_s = BODY_GAP_S + self._seen / BODY_RATE - self._waited_s
        began = time.perf_counter()
        try:
            message = await asyncio.wait_for(self._receive(), min(BODY_GAP_S, credit_s))
        except TimeoutError:
            self._more = False  # nor is it waited for after the answer
            raise BodyTimeout(f"The body came to a halt: {self._seen} bytes, then too few.") from None
        self._waited_s += time.perf_counter() - began
        if message["type"] == "http.request":
            self._more = message.get("more_body", False)
            self._seen += len(message.get("body", b""))
            if self._seen > self._limit:
                raise self._too_large()
        return message

    async def send(self, message: Message) -> None:
        """Add the headers that every response has; let a client that still sends read the answer."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.request_id
            headers["openai-version"] = "2020-10-01"
            headers["openai-processing-ms"] = str(self._elapsed_ms())
        elif self._more and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            await self._drain()
            message = {"type": "http.response.body", "body": b""}
        await self._send(message)

    async def _drain(self) -> None:
        # Closing a socket that holds unread data resets it, and the client may never see the answer.
        if "expect" in self._headers and not self._seen:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                more = True
                while more:
                    message = await self._receive()
                    more = message["type"] == "http.request" and message.get("more_body", False)

    def _elapsed_ms(self) -> int:
        return round((time.perf_counter() - self._started_at) * 1000)

    def _log(self) -> None:
        path = "".join(c if c.isprintable() else "?" for c in self._scope["path"][:200])
        status = self._status or CLIENT_GONE
        log.info("%s %s %d in %d ms", self._scope["method"], path, status, self._elapsed_ms())

"""Work that ends when the client leaves, and a stream response built on it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.api.answers import event
from app.api.errors import ClientGone
from app.core.errors import ServiceError

log = logging.getLogger(__name__)
Result = TypeVar("Result")


async def until_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`. Raises ClientGone, with the work cancelled, when the client leaves before."""
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events. `at_end` runs however it ends; a failure on the way becomes the last event."""

    def __init__(self, events: AsyncIterator[bytes], *, at_end: Callable[[], None]) -> None:
        super().__init__(media_type="text/event-stream")
        self._events = events
        self._at_end = at_end
        # No buffering in proxies: every word goes out at once.
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        try:
            await until_gone(receive, self._send_all(send))
        except ClientGone:
            log.info("the client left in the middle of the answer")
        finally:
            self._at_end()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for some in self._events:
                await send({"type": "http.response.body", "body": some, "more_body": True})
        except ServiceError as error:
            await send(_last_event(error))
        except Exception:  # a bug of ours; without this the client would see a cut connection
            log.exception("a stream ended by an error of the service")
            await send(_last_event(ServiceError("The server had an error. Try again.", code="server_error")))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _last_event(error: ServiceError) -> dict[str, Any]:
    body = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    return {"type": "http.response.body", "body": event({"error": body}), "more_body": True}

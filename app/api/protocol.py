"""HTTP/1.1 as uvicorn speaks it, with what it lacks: time limits for slow clients, a limit of connections,
and the envelope for what is no HTTP at all.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from app.api.descriptors import most_connections
from app.api.errors import envelope
from app.core.errors import InvalidRequest, ServiceError, Unavailable
from app.core.ids import Prefix, new_id

HEADER_S = 20.0  # from a connection, or the first byte of a further request, to the end of its headers
UNREAD_S = 60.0  # how long a client may read nothing of an answer before it is cut off
LINGER_S = 1.0  # how long a refused connection is kept, so that the client gets to read why


class Protocol(H11Protocol):
    """One connection."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._header_deadline: asyncio.TimerHandle | None = None
        self._write_deadline: asyncio.TimerHandle | None = None
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come."""
        super().connection_made(transport)
        # asyncio does it only for sockets that name their protocol, which accepted ones do not; without it
        # the body of every answer waits 40 ms for the acknowledgement of its headers.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if len(self.connections) > most_connections():
            self._refuse()
        else:
            self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        self._forget_deadlines()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of the client."""
        if self._refused:
            return
        if self._header_deadline is None and self.conn.their_state is h11.IDLE:
            self._expect_headers()
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE and self._header_deadline is not None:
            self._header_deadline.cancel()
            self._header_deadline = None

    def pause_writing(self) -> None:
        """The client reads slower than it is answered."""
        super().pause_writing()
        self._write_deadline = self.loop.call_later(UNREAD_S, self.transport.abort)

    def resume_writing(self) -> None:
        """It reads again."""
        if self._write_deadline is not None:
            self._write_deadline.cancel()
            self._write_deadline = None
        super().resume_writing()

    def on_response_complete(self) -> None:
        """An answer is out. Where its request's body was not read to the end, no other can follow."""
        if self.conn.their_state is h11.SEND_BODY:
            self.transport.close()
        super().on_response_complete()
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self._expect_headers()

    def send_400_response(self, msg: str) -> None:
        """Refuse and close."""
        text = f"{msg} Check the request line, the headers and their size."
        self._answer(InvalidRequest(text))
        self.transport.close()

    def _expect_headers(self) -> None:
        self._header_deadline = self.loop.call_later(HEADER_S, self._too_slow)

    def _too_slow(self) -> None:
        self._header_deadline = None
        if self.conn.trailing_data[0]:  # half a request; who sent nothing needs no answer
            error = InvalidRequest(f"The headers of the request did not come within {HEADER_S:g} s.")
            error.status = 408
            self._answer(error)
        self.transport.close()

    def _refuse(self) -> None:
        self._refused = True
        self._answer(Unavailable("The service has too many connections. Try again in a few seconds."))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LINGER_S, self.transport.close)

    def _answer(self, error: ServiceError) -> None:
        if self.conn.our_state is not h11.IDLE and self.conn.our_state is not h11.SEND_RESPONSE:
            return
        answer = envelope(error)
        answer.headers["x-request-id"] = new_id(Prefix.REQUEST)
        answer.headers["connection"] = "close"
        head = [(bytes(key), bytes(value)) for key, value in answer.raw_headers]
        response = h11.Response(status_code=error.status, headers=head, reason=_reason(error.status))
        for event in (response, h11.Data(data=bytes(answer.body)), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")

    def _forget_deadlines(self) -> None:
        for timer in (self._header_deadline, self._write_deadline):
            if timer is not None:
                timer.cancel()
        self._header_deadline = self._write_deadline = None


def _reason(status: int) -> bytes:
    return {400: b"Bad Request", 408: b"Request Timeout", 503: b"Service Unavailable"}[status]

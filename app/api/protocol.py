"""What is no HTTP at all still gets the envelope: uvicorn would answer it in plain text."""

from __future__ import annotations

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from app.api.errors import envelope
from app.core.errors import InvalidRequest
from app.core.ids import Prefix, new_id


class Protocol(H11Protocol):
    """uvicorn's HTTP/1.1 with one answer of ours."""

    def send_400_response(self, msg: str) -> None:
        """Refuse and close."""
        if self.conn.our_state is h11.IDLE or self.conn.our_state is h11.SEND_RESPONSE:
            answer = envelope(InvalidRequest(f"{msg} Check the request line, the headers and their size."))
            answer.headers["x-request-id"] = new_id(Prefix.REQUEST)
            answer.headers["connection"] = "close"
            headers = [(bytes(key), bytes(value)) for key, value in answer.raw_headers]
            for event in (
                h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                h11.Data(data=bytes(answer.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

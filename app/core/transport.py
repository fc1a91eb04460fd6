"""Celery's way to the broker, made to outlive garbage in a queue and a broker that refuses.

kombu lets an entry that is no message, and an answer such as READONLY or OOM, end the whole process, and
leaves its connections open when such an answer comes last.
"""

from __future__ import annotations

import logging
from queue import Empty
from typing import Any

from kombu.transport import redis as stock
from redis.exceptions import ResponseError

log = logging.getLogger(__name__)


class Channel(stock.Channel):
    """Drops what is no message; it has left the queue already."""

    def close(self) -> None:
        """Leave without a trace: where its last answer is a refusal, the stock one keeps its connections."""
        try:
            super().close()  # type: ignore[no-untyped-call]
        except Exception as error:  # kombu raises a different class for each kind of failure
            log.info("closing a channel to the broker: %s", type(error).__name__)
            super().close()  # type: ignore[no-untyped-call]

    def _brpop_read(self, **options: Any) -> Any:
        try:
            return super()._brpop_read(**options)  # type: ignore[no-untyped-call]
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            log.warning("something that is no message was dropped: %s", type(error).__name__)
            raise Empty from error


class Transport(stock.Transport):
    """A broker that refuses counts as one that is away: connect again, with pauses, until it serves."""

    Channel = Channel
    connection_errors = (*stock.Transport.connection_errors, ResponseError)

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        """As the stock one, which asks the broker; Celery forgets a connection that is refused here."""
        try:
            super().register_with_event_loop(connection, loop)  # type: ignore[no-untyped-call]
        except Exception:
            self.close_connection(connection)  # type: ignore[no-untyped-call]
            raise

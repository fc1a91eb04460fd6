"""Celery's way to the broker, made to outlive garbage in a queue and a broker that refuses.

kombu lets an entry that is no message, and an answer such as READONLY or OOM, end the whole process.
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

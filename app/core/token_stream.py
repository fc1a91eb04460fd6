"""Words of running completions over Redis: one reply stream per API process, one channel for cancels.

The worker appends lists of words; the API process that asked reads them all through one connection
and hands each to the request it belongs to. A stream nobody reads expires by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import redis

from app.core.completions import WORDS, Word

CANCELS = "luthier:cancels"  # pub/sub channel; every inference worker listens
MAX_ENTRIES = 20_000  # of one reply stream; a reader further behind than this has gone
STREAM_TTL_S = 3600


def reply_stream(process: str) -> str:
    """Key of the stream that an API process reads."""
    return f"luthier:replies:{process}"


class WordWriter:
    """The worker's end of one request: publishes its words to the process that waits for them.

    Entries are numbered, so that one lost with the broker's memory is noticed and not just missing.
    """

    def __init__(self, client: redis.Redis, *, reply_to: str, request_id: str) -> None:
        self._client = client
        self._stream = reply_to
        self._request_id = request_id
        self._number = 0

    def publish(self, words: Sequence[Word]) -> None:
        """Append words, in order, as one entry."""
        fields = {"id": self._request_id, "number": self._number, "words": WORDS.dump_json(list(words))}
        self._number += 1
        pipe = self._client.pipeline(transaction=False)
        pipe.xadd(self._stream, fields, maxlen=MAX_ENTRIES, approximate=True)  # type: ignore[arg-type]
        pipe.expire(self._stream, STREAM_TTL_S)
        pipe.execute()


@dataclass(frozen=True, slots=True)
class Entry:
    """Some words of one request; `number` counts the request's entries from 0."""

    request_id: str
    number: int
    words: list[Word]


def decode(fields: dict[bytes, bytes]) -> Entry:
    """One entry of a reply stream."""
    return Entry(fields[b"id"].decode(), int(fields[b"number"]), WORDS.validate_json(fields[b"words"]))

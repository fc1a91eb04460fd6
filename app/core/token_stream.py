"""Words of running completions over Redis: one reply stream per API process, one channel for cancels.

The worker appends lists of words; the API process that asked reads them all through one connection
and hands each to the request it belongs to. A stream nobody reads expires by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import redis

from app.core.completions import WORDS, Word

CANCELS = "luthier:cancels"  # pub/sub channel; every inference worker listens
MAX_ENTRIES = 20_000  # of one reply stream; a reader further behind than this has gone
STREAM_TTL_S = 3600


def reply_stream(process: str) -> str:
    """Key of the stream that an API process reads."""
    return f"luthier:replies:{process}"


class WordWriter:
    """The worker's end: publishes words to whichever process waits for them."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client

    def publish(self, reply_to: str, request_id: str, words: Sequence[Word]) -> None:
        """Append words of one request, in order, as one entry."""
        pipe = self._client.pipeline(transaction=False)
        fields: dict[bytes | str, bytes | str] = {"id": request_id, "words": WORDS.dump_json(list(words))}
        pipe.xadd(reply_to, fields, maxlen=MAX_ENTRIES, approximate=True)  # type: ignore[arg-type]
        pipe.expire(reply_to, STREAM_TTL_S)
        pipe.execute()


def decode(fields: dict[bytes, bytes]) -> tuple[str, list[Word]]:
    """The request id and the words of one entry."""
    return fields[b"id"].decode(), WORDS.validate_json(fields[b"words"])


def ask_to_stop(client: redis.Redis, request_id: str) -> None:
    """Tell all inference workers that nobody waits for this request any more."""
    client.publish(CANCELS, request_id)

"""Words of running completions over Redis: one reply stream per API process, one channel for cancels.

The worker appends lists of words; the API process that asked reads them all through one connection
and hands each to the request it belongs to. A stream nobody reads expires by itself.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import redis

from app.core.completions import WORDS, Word

CANCELS = "luthier:cancels"  # pub/sub channel; every inference worker listens
MAX_ENTRIES = 20_000  # of one reply stream; a reader further behind than this has gone
STREAM_TTL_S = 3600

log = logging.getLogger(__name__)


def reply_stream(process: str) -> str:
    """Key of the stream that an API process reads."""
    return f"luthier:replies:{process}"


@dataclass(frozen=True, slots=True)
class NewEntry:
    """Words of one request, ready to be appended to a reply stream."""

    stream: str
    fields: dict[str, str | int | bytes]


class WordWriter:
    """The worker's end of one request: makes entries for the process that waits for its words.

    Entries are numbered, so that one lost with the broker's memory is noticed and not just missing.
    """

    def __init__(self, *, reply_to: str, request_id: str) -> None:
        self._stream = reply_to
        self._request_id = request_id
        self._number = 0

    def entry(self, words: Sequence[Word]) -> NewEntry:
        """The next entry: these words, in order."""
        number, self._number = self._number, self._number + 1
        words_json = WORDS.dump_json(list(words), exclude_none=True)
        return NewEntry(self._stream, {"id": self._request_id, "number": number, "words": words_json})


def publish_entries(client: redis.Redis, entries: Sequence[NewEntry]) -> None:
    """Append entries to their streams, in order, in one round trip."""
    pipe = client.pipeline(transaction=False)
    for entry in entries:
        pipe.xadd(entry.stream, entry.fields, maxlen=MAX_ENTRIES, approximate=True)  # type: ignore[arg-type]
    for stream in dict.fromkeys(entry.stream for entry in entries):
        pipe.expire(stream, STREAM_TTL_S)
    pipe.execute()


class WordPost:
    """One thread that publishes entries, so that who makes words never waits for the broker.

    What gathers during one round trip goes out together in the next. Entries that cannot be published are
    dropped: their reader notices the gap, and to keep them would only make it wait longer.
    """

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._waiting: SimpleQueue[NewEntry | threading.Event] = SimpleQueue()
        self._failing = False
        threading.Thread(target=self._run, name="word-post", daemon=True).start()

    def put(self, entry: NewEntry) -> None:
        """Take an entry and return at once."""
        self._waiting.put(entry)

    def flush(self, *, timeout_s: float) -> bool:
        """Whether all that was put before this call is out (or dropped) within the time."""
        reached = threading.Event()
        self._waiting.put(reached)
        return reached.wait(timeout_s)

    def _run(self) -> None:
        while True:
            taken = [self._waiting.get()]
            try:
                while True:
                    taken.append(self._waiting.get_nowait())
            except Empty:
                pass
            self._publish([item for item in taken if isinstance(item, NewEntry)])
            for item in taken:
                if isinstance(item, threading.Event):
                    item.set()

    def _publish(self, entries: list[NewEntry]) -> None:
        if not entries:
            return
        try:
            publish_entries(self._client, entries)
            self._failing = False
        except Exception as error:  # whatever the broker does, this thread must outlive it
            if not self._failing:
                log.warning("words are lost from now on: %s", type(error).__name__)
            self._failing = True


@dataclass(frozen=True, slots=True)
class Entry:
    """Some words of one request; `number` counts the request's entries from 0."""

    request_id: str
    number: int
    words: list[Word]


def decode(fields: dict[bytes, bytes]) -> Entry:
    """One entry of a reply stream."""
    return Entry(fields[b"id"].decode(), int(fields[b"number"]), WORDS.validate_json(fields[b"words"]))

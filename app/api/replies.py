"""Words of running completions, from this process's stream to the requests that wait for them.

One task reads the stream for all requests. When the broker goes away, the words of that time are lost,
so every waiting request fails at once instead of hanging. Knows neither HTTP nor messages.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import redis.asyncio
from redis.exceptions import RedisError

from app.core.completions import Failed, Finished, Word
from app.core.errors import ServiceError, Unavailable
from app.core.token_stream import CANCELS, Entry, decode

log = logging.getLogger(__name__)

BLOCK_MS = 5_000  # below the socket's time-out of 10 s
READ_COUNT = 500  # entries of one read
TRIM_EVERY = 500  # entries read before they are removed; the stream holds up to 20,000
RETRY_FIRST_S, RETRY_MOST_S = 0.1, 2.0


LOST = Failed(
    status=503,
    code="service_unavailable",
    message="The connection to the model was lost before the answer was whole. Try again.",
)


class AnswerFailed(ServiceError):
    """The engine ended the request; its status is the engine's."""

    def __init__(self, failed: Failed) -> None:
        super().__init__(failed.message, code=failed.code, param=failed.param)
        self.status = failed.status
        self.type = "server_error" if failed.status >= 500 else "invalid_request_error"

    @property
    def headers(self) -> dict[str, str]:
        """Tells the client when to come back, where coming back can help."""
        return {"retry-after": "2"} if self.status in (429, 503) else {}


class Reply:
    """The words of one request. `close` it whatever happens: an answer nobody reads is stopped."""

    def __init__(self, reader: ReplyReader, request_id: str, *, n: int) -> None:
        self._reader = reader
        self._id = request_id
        self._open = n
        self._held: list[Word] = []
        self._entries = 0
        self.queue: asyncio.Queue[list[Word]] = asyncio.Queue()

    def take(self, entry: Entry) -> None:
        """Keep the words of the next entry; one that is missing ends the answer."""
        whole = entry.number == self._entries
        self._entries += 1
        self.queue.put_nowait(entry.words if whole else [LOST])

    async def wait(self, timeout_s: float) -> None:
        """Wait for the first words. Raises what the engine says, or Unavailable after `timeout_s`."""
        try:
            self._held = await asyncio.wait_for(self.queue.get(), timeout_s)
        except TimeoutError:
            raise Unavailable(
                "The model did not begin to answer in time. Try again in a few seconds.",
                code="engine_timeout",
            ) from None
        _raise_failed(self._held[:1])

    async def words(self, *, gap_s: float) -> AsyncIterator[list[Word]]:
        """Words as they come, several at once when they came together, until all choices are finished."""
        while True:
            words, self._held = self._held, []
            good: list[Word] = [word for word in words if not isinstance(word, Failed)]
            self._open -= sum(isinstance(word, Finished) for word in good)
            if good:
                yield good
            _raise_failed(words[len(good) :])
            if self._open <= 0:
                return
            try:
                self._held = await asyncio.wait_for(self.queue.get(), gap_s)
            except TimeoutError:
                text = "The model stopped in the middle of its answer. Try again."
                raise Unavailable(text, code="engine_timeout") from None

    def close(self) -> None:
        """Nobody reads any more."""
        self._reader.forget(self._id, finished=self._open <= 0)


class ReplyReader:
    """Reads the stream of this process and hands each entry to the request it belongs to."""

    def __init__(self, client: redis.asyncio.Redis, stream: str) -> None:
        self.stream = stream
        self._client = client
        self._waiting: dict[str, Reply] = {}
        self._last = b"0-0"
        self._untrimmed = 0
        self._stopping: set[asyncio.Task[None]] = set()
        self._over = False

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Read for as long as the block lasts."""
        task = asyncio.create_task(self._run(), name="replies")
        try:
            yield
        finally:
            self._over = True  # the client may take the cancel for a broken connection
            task.cancel()
            await asyncio.gather(task, *self._stopping, return_exceptions=True)
            with suppress(RedisError, OSError):
                await self._client.delete(self.stream)
            await self._client.aclose()

    def expect(self, request_id: str, *, n: int) -> Reply:
        """Words of this request will be kept from now on."""
        reply = self._waiting[request_id] = Reply(self, request_id, n=n)
        return reply

    def forget(self, request_id: str, *, finished: bool) -> None:
        """Drop what still comes; tell the workers to stop unless they are done."""
        if self._waiting.pop(request_id, None) is not None and not finished:
            task = asyncio.create_task(self._ask_to_stop(request_id))
            self._stopping.add(task)
            task.add_done_callback(self._stopping.discard)

    async def _ask_to_stop(self, request_id: str) -> None:
        try:
            await self._client.publish(CANCELS, request_id)
        except (RedisError, OSError) as error:
            log.warning("cancel of %s not sent: %s", request_id, type(error).__name__)

    async def _run(self) -> None:
        pause_s = RETRY_FIRST_S
        while not self._over:
            try:
                await self._read()
                pause_s = RETRY_FIRST_S
            except (RedisError, OSError) as error:
                log.warning("reply stream lost (%s); again in %.1f s", type(error).__name__, pause_s)
                self._fail_all()
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, RETRY_MOST_S)

    async def _read(self) -> None:
        streams = {self.stream: self._last}
        # The client's own type tells nothing of an entry: its shape depends on the protocol's version.
        answer: Any = await self._client.xread(streams, count=READ_COUNT, block=BLOCK_MS)  # type: ignore[arg-type]
        for _, entries in answer or ():
            for entry_id, fields in entries:
                self._last = entry_id
                self._untrimmed += 1
                self._hand_over(fields)
        if self._untrimmed >= TRIM_EVERY:
            await self._client.xtrim(self.stream, minid=self._last, approximate=False)
            self._untrimmed = 0

    def _hand_over(self, fields: dict[bytes, bytes]) -> None:
        try:
            entry = decode(fields)
        except (KeyError, ValueError):
            log.exception("an entry of the reply stream is no list of words")
            return
        reply = self._waiting.get(entry.request_id)
        if reply is not None:
            reply.take(entry)

    def _fail_all(self) -> None:
        self._last = b"0-0"  # a broker that starts empty may have another clock
        for reply in self._waiting.values():
            reply.queue.put_nowait([LOST])


def _raise_failed(words: list[Word]) -> None:
    for word in words:
        if isinstance(word, Failed):
            raise AnswerFailed(word)

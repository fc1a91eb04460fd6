"""Many streamed answers at once from any server that speaks OpenAI's HTTP, and what their clocks say.

Plain asyncio and one connection a stream, so that the client costs the machine about nothing.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

WORDS = ("order", "kettle", "refund", "parcel", "invoice", "garden", "lamp", "street")
PATIENCE_S = 280.0  # for one answer
TEMPLATE_TOKENS = 40  # of SmolLM2's chat template around one message, about


@dataclass(frozen=True)
class Endpoint:
    """A server. `extra`: what goes into each body, e.g. that the end of the text is to be ignored."""

    base_url: str
    key: str = "none"
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Answer:
    """One stream's clock: when its words came, in seconds of the monotonic clock."""

    began: float
    tokens: int
    times: list[float] = field(default_factory=list)
    text: str = ""

    @property
    def first_s(self) -> float:
        return self.times[0] - self.began

    @property
    def gaps(self) -> list[tuple[float, float]]:
        """(when it began, seconds) of each wait between two words."""
        return [(a, b - a) for a, b in zip(self.times, self.times[1:], strict=False)]


def message(seed: int, tokens: int) -> str:
    """Text of about `tokens` tokens, the same for one seed; each begins differently."""
    choose = random.Random(seed)
    return " ".join(choose.choices(WORDS, k=max(1, tokens)))


def body(endpoint: Endpoint, text: str, tokens: int, **more: Any) -> dict[str, Any]:
    """A greedy, streamed chat request of one message; `more` names the model."""
    fields: dict[str, Any] = {
        "messages": [{"role": "user", "content": text}],
        "max_tokens": tokens,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return fields | dict(endpoint.extra) | more


async def ask(endpoint: Endpoint, request: Mapping[str, Any]) -> Answer:
    """Send a request and read its stream to the end; ends the program on an error."""
    answer = Answer(time.monotonic(), tokens=int(request["max_tokens"]))
    async with asyncio.timeout(PATIENCE_S):
        async for line in _lines(endpoint, json.dumps(request).encode()):
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise SystemExit(f"{request['model']}: {event['error']}")
            if (event.get("usage") or {}).get("completion_tokens"):
                answer.tokens = event["usage"]["completion_tokens"]
            text = "".join((c.get("delta") or {}).get("content") or "" for c in event.get("choices", ()))
            if text:
                answer.times.append(time.monotonic())
                answer.text += text
    if not answer.times:
        raise SystemExit(f"{request['model']}: an answer without a word")
    return answer


async def _lines(endpoint: Endpoint, data: bytes) -> AsyncIterator[bytes]:
    """The lines of a chunked reply."""
    address = urlsplit(endpoint.base_url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port, limit=2**20)
    try:
        head = (
            f"POST {address.path.rstrip('/')}/chat/completions HTTP/1.1\r\nHost: {address.netloc}\r\n"
            f"Authorization: Bearer {endpoint.key}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
        )
        writer.write(head.encode() + data)
        status = await reader.readline()
        headers = (await reader.readuntil(b"\r\n\r\n")).lower()
        if b" 200 " not in status:
            raise SystemExit(f"{status.decode().strip()}: {(await reader.read(2000)).decode()[:1000]}")
        rest = b""
        async for piece in _pieces(reader, chunked=b"chunked" in headers):
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                yield line.strip()
    finally:
        writer.close()


async def _pieces(reader: asyncio.StreamReader, *, chunked: bool) -> AsyncIterator[bytes]:
    while True:
        if not chunked:
            piece = await reader.read(65536)
        else:
            size = int(await reader.readline() or b"0", 16)
            piece = (await reader.readexactly(size + 2))[:size] if size else b""
        if not piece:
            return
        yield piece


async def ask_all(endpoint: Endpoint, requests: Sequence[Mapping[str, Any]]) -> list[Answer]:
    """All at once."""
    return list(await asyncio.gather(*(ask(endpoint, request) for request in requests)))


def figures(answers: Sequence[Answer]) -> dict[str, float]:
    """Tokens a second over all, waits for first and further words."""
    ends = max(answer.times[-1] for answer in answers)
    wall_s = ends - min(answer.began for answer in answers)
    firsts = [answer.first_s for answer in answers]
    gaps = [gap for answer in answers for _, gap in answer.gaps] or [0.0]
    return {
        "tokens_per_s": sum(answer.tokens for answer in answers) / wall_s,
        "first_p50_s": share(firsts, 0.5),
        "first_p95_s": share(firsts, 0.95),
        "gap_p50_ms": 1000 * share(gaps, 0.5),
        "gap_p95_ms": 1000 * share(gaps, 0.95),
    }


def share(values: Sequence[float], part: float) -> float:
    """The value below which `part` of them lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def show(mode: str, side: str, what: str, found: Mapping[str, float]) -> None:
    """One line, at once."""
    columns = "  ".join(f"{name} {value:.4g}" for name, value in found.items())
    print(f"{mode}  {side:<22}{what:<22}{columns}", flush=True)

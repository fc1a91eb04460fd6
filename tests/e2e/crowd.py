"""Many open streams at once through a whole service: who was answered, when, and how evenly.

A program too: `python -m tests.e2e.crowd --streams 200` starts a service on a tiny model of its own and
prints what it saw; `--base-url` and `--keys` take one that runs already.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.e2e.service import KEY, Service, running_service

PATIENCE_S = 600.0  # of one stream, from its request to its end


@dataclass
class Heard:
    """One stream. Moments are seconds since the crowd began; `at`: of each piece of text."""

    project: int
    error: str = ""
    tokens: int = 0
    at: list[float] = field(default_factory=list)
    ended: float = 0.0


async def listen(http: httpx.AsyncClient, heard: Heard, *, key: str, body: dict[str, object]) -> None:
    """Open a stream and read it to its end."""
    began = time.monotonic()
    done = False
    headers = {"authorization": f"Bearer {key}"}
    try:
        async with http.stream("POST", "chat/completions", json=body, headers=headers) as answer:
            if answer.status_code != 200:
                heard.error = f"{answer.status_code} {(await answer.aread()).decode()[:200]}"
                return
            async for event in events_of(answer):
                done = done or event == b"data: [DONE]"
                if event.startswith(b"data: {"):
                    read_event(json.loads(event[6:]), heard, time.monotonic() - began)
    except httpx.HTTPError as error:
        heard.error = repr(error)
    heard.ended = time.monotonic() - began
    if not done and not heard.error:
        heard.error = "the stream ended without its end"


async def events_of(answer: httpx.Response) -> AsyncIterator[bytes]:
    """Events as they come. Not by httpx's lines: to it some characters of a text end a line too."""
    rest = b""
    async for piece in answer.aiter_bytes():
        *events, rest = (rest + piece).split(b"\n\n")
        for event in events:
            yield event


def read_event(event: dict[str, object], heard: Heard, now: float) -> None:
    """Note an error, a piece of text, or the usage."""
    if event.get("error"):
        heard.error = str(event["error"])
    usage = event.get("usage")
    if isinstance(usage, dict):
        heard.tokens = usage["completion_tokens"]
    choices = event.get("choices")
    if isinstance(choices, list) and choices and choices[0]["delta"].get("content"):
        heard.at.append(now)


async def crowd(base_url: str, keys: Sequence[str], *, streams: int, tokens: int, model: str) -> list[Heard]:
    """Open so many streams at once, in turn for each key; returns when all have ended."""
    body: dict[str, object] = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    body |= {"max_completion_tokens": tokens, "luthier": {"ignore_eos": True}}
    all_heard = [Heard(number % len(keys)) for number in range(streams)]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=base_url, timeout=PATIENCE_S, limits=limits) as http:
        asks = [
            listen(
                http,
                heard,
                key=keys[heard.project],
                body=body | {"seed": number, "messages": [{"role": "user", "content": f"count to {number}"}]},
            )
            for number, heard in enumerate(all_heard)
        ]
        await asyncio.gather(*asks)
    return all_heard


def report(all_heard: Sequence[Heard], *, projects: int) -> list[str]:
    """What a person wants to know, in lines."""
    good = [heard for heard in all_heard if not heard.error]
    lines = [f"{len(all_heard)} streams, {len(all_heard) - len(good)} with an error"]
    lines += sorted({heard.error for heard in all_heard if heard.error})[:5]
    if not good:
        return lines
    whole_s = max(heard.ended for heard in good)
    tokens = sum(heard.tokens for heard in good)
    lines.append(f"{tokens} tokens in {whole_s:.1f} s: {tokens / whole_s:.0f} per second")
    lines.append("first word: " + spread([heard.at[0] for heard in good if heard.at]))
    gaps = [b - a for heard in good for a, b in zip(heard.at, heard.at[1:], strict=False)]
    if gaps:
        lines.append("between words of a stream: " + spread(gaps))
    half = [sum(t < whole_s / 2 for h in good if h.project == p for t in h.at) for p in range(projects)]
    lines.append("pieces of text in the first half of the time, by project: " + ", ".join(map(str, half)))
    return lines


def spread(seconds: Sequence[float]) -> str:
    """Median, 95th of a hundred, most."""
    ordered = sorted(seconds)
    p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return f"p50 {statistics.median(ordered):.3f} s, p95 {p95:.3f} s, most {ordered[-1]:.3f} s"


def make_keys(service: Service, n: int) -> list[str]:
    """Keys of as many projects; the first is the service's own."""
    words = [sys.executable, "-m", "app.cli.main", "keys", "create", "--name", "crowd"]
    made = [
        subprocess.run(
            [*words, "--project", f"crowd-{number}", "--data-dir", str(service.data_dir)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        for number in range(1, n)
    ]
    return [KEY, *made]


def main() -> None:
    """Measure and print; exits 1 when a stream had an error."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--streams", type=int, default=200)
    arguments.add_argument("--tokens", type=int, default=64)
    arguments.add_argument("--projects", type=int, default=2)
    arguments.add_argument("--model", default="tiny")
    arguments.add_argument("--base-url", help="of a running service, with its /v1")
    arguments.add_argument("--keys", default=KEY, help="of that service, separated by commas")
    options = arguments.parse_args()

    def run(url: str, keys: Sequence[str]) -> None:
        asked = crowd(url, keys, streams=options.streams, tokens=options.tokens, model=options.model)
        all_heard = asyncio.run(asked)
        sys.stdout.write("\n".join([*report(all_heard, projects=len(keys)), ""]))
        sys.exit(any(heard.error for heard in all_heard))

    if options.base_url:
        run(options.base_url, options.keys.split(","))
    with tempfile.TemporaryDirectory() as folder, running_service(Path(folder)) as service:
        run(service.base_url, make_keys(service, options.projects))


if __name__ == "__main__":
    main()

"""How fast mixed adapters are answered: `make bench-serve ARGS='s1 --peers llama'` on an idle machine.

S1: 32 streams on 1, 8 and 32 adapters. S2: one stream. S3: a job succeeds while 16 streams run. S4: what API
and broker add to the engine. S5: a shared beginning of all prompts. S6: memory over minutes of random load.
`adapters`: 500 of them in storage, 64 in memory. Ours is the whole API in exact float32 unless a
line says otherwise; peers run one after the other in the same call, each alone on the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import openai

from benchmarks import serve_engine as alone
from benchmarks import serve_sides as sides
from benchmarks.serve_sides import Side
from benchmarks.streams import Answer, ask, ask_all, body, figures, message, share, show

BUILD = Path("build/bench-serve")
PEERS = Path("build/peers")
STEADY_S = 2.0  # streams run so long before something is measured beside them
POLL_S = 0.02


class Bench:
    """The model, its random adapters, and what was asked for on the command line."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.model_dir: Path = options.model.absolute()
        self.adapters = alone.make_adapters(BUILD / "adapters", self.model_dir, max(options.adapters))

    def ours(self, **settings: str) -> AbstractContextManager[Side]:
        """The whole API with all adapters in memory; a slow machine is measured, not refused."""
        chosen = {"inference_dtype": "float32", "max_batch": "64", "kv_cache_mb": "3000"}
        chosen |= {"first_word_s": "240", **settings}
        return sides.ours(BUILD / "data", self.adapters, self.model_dir, **chosen)

    def peers(self) -> Iterator[tuple[str, Callable[[int], AbstractContextManager[Side]]]]:
        """Name, and what starts it with so many adapters."""
        starts = {
            "llama": lambda count: sides.llama(
                PEERS / "serve_llama/bin/python",
                self.model_dir,
                self.adapters[:count],
                folder=BUILD / "gguf",
                streams=self.options.streams,
            ),
            "transformers": lambda _count: sides.transformers(
                PEERS / "serve_transformers/bin/python", self.model_dir
            ),
            "vllm": lambda count: sides.vllm(
                PEERS / "serve_vllm/bin/python", self.model_dir, self.adapters[:count]
            ),
        }
        return ((name, starts[name]) for name in self.options.peers if name in starts)

    def streams(self, side: Side, count: int, streams: int, *, prompt: int, tokens: int) -> list[Answer]:
        """So many at once over `count` adapters (0: the base)."""
        requests = []
        for number in range(streams):
            more = side.body(number % count if count else None)
            if side.name == "transformers serve":
                more |= sides.endless(tokens)
            requests.append(body(side.endpoint, message(number, prompt), tokens, **more))
        return asyncio.run(ask_all(side.endpoint, requests))


def s1(bench: Bench) -> None:
    """Streams over 1, 8 and 32 adapters; a peer without adapters answers as the base."""
    options = bench.options
    work = {"prompt": options.prompt, "tokens": options.tokens}
    with bench.ours() as side:
        bench.streams(side, max(options.adapters), options.streams, prompt=4, tokens=2)  # all in memory
        for _ in range(options.runs):
            for count in options.adapters:
                answers = bench.streams(side, count, options.streams, **work)
                show("S1", side.name, f"{count} adapters", figures(answers))
    for name, start in bench.peers():
        with start(max(options.adapters)) as side:
            bench.streams(side, 0, 1, prompt=4, tokens=2)
            for count in [0] if name == "transformers" else options.adapters:
                answers = bench.streams(side, count, options.streams, **work)
                show("S1", side.name, f"{count} adapters" if count else "base", figures(answers))
    if "peft" in options.peers:
        for count in options.adapters:
            rate = alone.run_peft(
                bench.model_dir,
                bench.adapters[:count],
                streams=options.streams,
                prompt=options.prompt,
                tokens=options.peft_tokens,
            )
            show("S1", "peft generate", f"{count} adapters", {"tokens_per_s": rate})


def s2(bench: Bench) -> None:
    """One stream, one adapter and none."""
    with bench.ours() as side:
        _one_stream(bench, side, [1, 0])
    for name, start in bench.peers():
        with start(1) as side:
            _one_stream(bench, side, [0] if name == "transformers" else [1, 0])
    if "peft" in bench.options.peers:
        rate = alone.run_peft(bench.model_dir, bench.adapters[:1], streams=1, prompt=16, tokens=32)
        show("S2", "peft generate", "1 adapter", {"tokens_per_s": rate})


def _one_stream(bench: Bench, side: Side, counts: list[int]) -> None:
    for count in counts:
        bench.streams(side, count, 1, prompt=16, tokens=4)
        runs = [bench.streams(side, count, 1, prompt=16, tokens=bench.options.tokens)[0] for _ in range(3)]
        rates = [run.tokens / (run.times[-1] - run.began) for run in runs]
        found = {"tokens_per_s": statistics.median(rates), "lowest": min(rates), "highest": max(rates)}
        what = "1 adapter" if count else "base"
        show("S2", side.name, what, found)
        print(f"S2  {side.name:<22}{what:<22}says {runs[0].text[:70]!r}", flush=True)


def s3(bench: Bench) -> None:
    """From `succeeded` to the first word of the new model, and the longest wait of 16 running streams."""
    with bench.ours() as side:
        asyncio.run(_new_model(side))


async def _new_model(side: Side) -> None:
    client = openai.AsyncOpenAI(base_url=side.endpoint.base_url, api_key=sides.KEY)
    file = await client.files.create(
        file=io.BytesIO((json.dumps(sides.EXAMPLE) + "\n").encode() * 10), purpose="fine-tune"
    )
    answers: list[Answer] = []
    ended = asyncio.Event()

    async def keep_asking(number: int) -> None:
        while not ended.is_set():
            request = body(side.endpoint, message(number, 64), 200, **side.body(0))
            answers.append(await ask(side.endpoint, request))

    running = [asyncio.create_task(keep_asking(number)) for number in range(16)]
    await asyncio.sleep(STEADY_S)
    job = await client.fine_tuning.jobs.create(
        model=sides.MODEL, training_file=file.id, hyperparameters={"n_epochs": 1, "batch_size": 10}
    )
    while job.status not in ("succeeded", "failed", "cancelled"):
        await asyncio.sleep(POLL_S)
        job = await client.fine_tuning.jobs.retrieve(job.id)
    if job.status != "succeeded":
        raise SystemExit(f"{job.id} {job.status}: {job.error}")
    seen = time.monotonic()
    request = body(side.endpoint, message(99, 16), 4, model=str(job.fine_tuned_model))
    first = await ask(side.endpoint, request)
    ended.set()
    await asyncio.gather(*running)
    gaps = [(at, gap) for answer in answers for at, gap in answer.gaps]
    during = [gap for at, gap in gaps if seen - 0.5 <= at <= first.times[0]]
    before = [gap for at, gap in gaps if at < seen - 0.5]
    found = {
        "first_word_s": first.first_s,
        "worst_gap_ms": 1000 * max(during, default=0.0),
        "gap_p50_ms": 1000 * share(before, 0.5),
        "gap_p99_ms": 1000 * share(before, 0.99),
    }
    show("S3", side.name, "16 streams", found)


def s4(bench: Bench) -> None:
    """The engine alone, then the same through the API: first words, processor time, tokens a second."""
    options = bench.options
    asked = [(None, message(number, options.prompt)) for number in range(64)]
    with alone.running_engine(bench.model_dir) as engine:
        alone.run(engine, asked[:1], 4)
        lone = [alone.run(engine, [(None, message(n, 16))], 4)[0].first_s for n in range(10)]
        cpu_s, answers = time.process_time(), alone.run(engine, asked, options.tokens)
        cpu_s = time.process_time() - cpu_s
    made = sum(answer.tokens for answer in answers)
    per_token = {"first_alone_ms": 1000 * statistics.median(lone), "cpu_us_per_token": 1e6 * cpu_s / made}
    show("S4", "engine alone", "64 streams", figures(answers) | per_token)
    with bench.ours(max_requests_in_flight="128", prefix_cache_mb="0") as side:
        bench.streams(side, 0, 1, prompt=16, tokens=4)
        lone = [
            asyncio.run(ask(side.endpoint, body(side.endpoint, message(n, 16), 4, **side.body(None)))).first_s
            for n in range(10)
        ]
        before = _cpu_s(side)
        answers = bench.streams(side, 0, 64, prompt=options.prompt, tokens=options.tokens)
        after = _cpu_s(side)
    made = sum(answer.tokens for answer in answers)
    used = {f"{name}_us_per_token": 1e6 * (after[name] - before.get(name, 0.0)) / made for name in after}
    per_token = {"first_alone_ms": 1000 * statistics.median(lone), **used}
    show("S4", side.name, "64 streams", figures(answers) | per_token)


def _cpu_s(side: Side) -> dict[str, float]:
    """Seconds of processor time by part; databases and whatever else is there count as `others`."""
    found = {"api": 0.0, "inference": 0.0, "others": 0.0}
    for process in side.process.children(recursive=True):
        words = " ".join(process.cmdline())
        part = "inference" if "--queues inference" in words else "api" if words.endswith(" api") else "others"
        times = process.cpu_times()
        found[part] += times.user + times.system
    return found


def s5(bench: Bench) -> None:
    """First words of prompts that share 300 tokens; the engine alone."""
    tuned = alone.weights(bench.adapters, 1)[0]
    without, cached = alone.prefix_cache(bench.model_dir, tuned, rounds=10)
    found = {"without_s": statistics.median(without), "with_s": statistics.median(cached)}
    show("S5", "engine alone", "300 shared tokens", found | {"ratio": found["without_s"] / found["with_s"]})


def s6(bench: Bench) -> None:
    """Memory and speed every half minute of random load, seeded; settings as they come."""
    with bench.ours(max_batch="32", kv_cache_mb="1024") as side:
        asyncio.run(_random_load(bench, side))


async def _random_load(bench: Bench, side: Side) -> None:
    choose, answers = random.Random(6), []
    ends = time.monotonic() + bench.options.minutes * 60

    async def keep_asking() -> None:
        while time.monotonic() < ends:
            number = choose.choice([None, *range(len(bench.adapters))])
            text, tokens = message(choose.randrange(10**6), choose.randint(4, 300)), choose.randint(1, 100)
            request = body(side.endpoint, text, tokens, **side.body(number))
            answers.append(await ask(side.endpoint, request))

    running = [asyncio.create_task(keep_asking()) for _ in range(16)]
    began = since = time.monotonic()
    counted = 0
    while time.monotonic() < ends:
        await asyncio.sleep(min(30.0, max(0.1, ends - time.monotonic())))
        made = sum(answer.tokens for answer in answers)
        found = {f"{name}_mb": size / 2**20 for name, size in _rss(side).items()}
        found["tokens_per_s"] = (made - counted) / (time.monotonic() - since)
        show("S6", side.name, f"{time.monotonic() - began:.0f} s", found)
        counted, since = made, time.monotonic()
    await asyncio.gather(*running)


def _rss(side: Side) -> dict[str, int]:
    found = {"api": 0, "inference": 0}
    for process in side.process.children(recursive=True):
        words = " ".join(process.cmdline())
        part = "inference" if "--queues inference" in words else "api" if words.endswith(" api") else None
        if part is not None:
            found[part] = max(found[part], process.memory_info().rss)
    return found


def adapters(bench: Bench) -> None:
    """Random ones of 64, 128, 256 and 500 adapters while memory holds 64; the engine alone."""
    options = bench.options
    steps = alone.residency(
        bench.model_dir,
        bench.adapters,
        resident=options.resident,
        stored=options.stored,
        requests=options.requests,
    )
    for count, found in steps:
        show("adapters", "engine alone", f"{options.resident} of {count} in memory", found)


MODES: dict[str, Callable[[Bench], None]] = {
    mode.__name__: mode for mode in (s1, s2, s3, s4, s5, s6, adapters)
}


def parse() -> argparse.Namespace:
    """What to measure."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("modes", nargs="*", default=list(MODES), choices=MODES)
    arguments.add_argument("--model", type=Path, default=Path(".venv/models/smollm2-135m-instruct"))
    arguments.add_argument(
        "--peers", nargs="*", default=[], choices=["llama", "transformers", "vllm", "peft"]
    )
    arguments.add_argument("--adapters", type=int, nargs="+", default=[1, 8, 32])
    arguments.add_argument("--streams", type=int, default=32)
    arguments.add_argument("--prompt", type=int, default=88, help="words; the template adds 40 tokens")
    arguments.add_argument("--tokens", type=int, default=64)
    arguments.add_argument("--peft-tokens", type=int, default=16, help="its batch is slow at many adapters")
    arguments.add_argument("--runs", type=int, default=1)
    arguments.add_argument("--minutes", type=float, default=4.0, help="of S6")
    arguments.add_argument("--resident", type=int, default=64)
    arguments.add_argument("--stored", type=int, nargs="+", default=[64, 128, 256, 500])
    arguments.add_argument("--requests", type=int, default=200, help="of `adapters`, for each line")
    return arguments.parse_args()


def main() -> None:
    """Measure and print."""
    bench = Bench(parse())
    for mode in bench.options.modes:
        MODES[mode](bench)


if __name__ == "__main__":
    main()

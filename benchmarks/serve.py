"""How fast mixed adapters are answered: `make bench-serve` on an otherwise idle machine.

The engine alone against peft's `generate(adapter_names=…)`, in turn, in one run, same weights, same prompts:
S1 (streams on 1, 8 and 32 adapters), S2 (one stream), S3 (a new adapter while others run). Random adapters of
the real model; greedy; ends of text are ignored. What API and broker add is not measured here.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from app.core.completions import CompletionRequest, Failed, Sampling, TunedWeights, WeightsKind, Word
from app.core.manifest import write_manifest
from worker.base_model import load_base_model, load_tokenizer
from worker.serving.engine import Engine, EngineLimits

CPU = torch.device("cpu")
RANK = 16
HELD_BACK = 1  # adapters the engine has not heard of before S3


class Stream:
    """One request's clock: when its words came."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.times: list[float] = []
        self.tokens = 0
        self.done = threading.Event()

    def __call__(self, words: list[Word]) -> None:
        now = time.monotonic()
        for word in words:
            if isinstance(word, Failed):
                raise SystemExit(word.message)
            if word.word == "delta":
                self.times.append(now)
            else:
                self.tokens = word.completion_tokens
                self.done.set()

    @property
    def first_s(self) -> float:
        return self.times[0] - self.began

    @property
    def gaps_s(self) -> list[float]:
        return [late - early for early, late in zip(self.times, self.times[1:], strict=False)]


class Bench:
    """The real model, random adapters in folders, prompts of an exact length."""

    def __init__(self, model_dir: Path, folder: Path, options: argparse.Namespace) -> None:
        self.model_dir, self.options = model_dir, options
        self.tokenizer = load_tokenizer(model_dir)
        count = max(options.adapters) + HELD_BACK
        self.adapters = [self._make_adapter(folder / f"a{number}", number) for number in range(count)]
        self._words = [
            f" {word}"
            for word in ["order", "kettle", "refund", "parcel", "invoice", "garden", "lamp", "street"]
        ]
        self.count = 0

    def request(self, tuned: TunedWeights | None, *, prompt: int, tokens: int) -> CompletionRequest:
        """A request whose rendered prompt has about `prompt` tokens."""
        self.count += 1
        choose = random.Random(self.count)
        text = "".join(choose.choices(self._words, k=max(1, prompt - 40)))
        return CompletionRequest(
            id=f"bench-{self.count}",
            project_id="bench",
            base_model="bench",
            tuned=tuned,
            messages=[{"role": "user", "content": text}],
            sampling=Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True),
            reply_to="",
            expires_at=time.time() + 3600,
        )

    def prompt_ids(self, request: CompletionRequest) -> list[int]:
        """As the engine renders it."""
        ids: Any = self.tokenizer.apply_chat_template(
            request.messages, add_generation_prompt=True, return_dict=False
        )
        return list(ids)

    def _make_adapter(self, folder: Path, seed: int) -> TunedWeights:
        base = load_base_model(self.model_dir, quantize_4bit=False, device=CPU, dtype=torch.float32)
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
        model = get_peft_model(base, config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.02, generator=generator)
        model.save_pretrained(str(folder))
        write_manifest(folder)
        return TunedWeights(id=folder.name, kind=WeightsKind.LORA, path=str(folder))


def run_engine(engine: Engine, bench: Bench, count: int, *, streams: int) -> dict[str, float]:
    """S1 or S2 once: all streams opened together."""
    options = bench.options
    before_s = time.process_time()
    listeners = []
    began = time.monotonic()
    for number in range(streams):
        tuned = bench.adapters[number % count] if count else None
        listener = Stream()
        engine.submit(bench.request(tuned, prompt=options.prompt, tokens=options.tokens), listener)
        listeners.append(listener)
    for listener in listeners:
        listener.done.wait()
    wall_s = time.monotonic() - began
    made = sum(listener.tokens for listener in listeners)
    gaps = sorted(gap for listener in listeners for gap in listener.gaps_s)
    firsts = sorted(listener.first_s for listener in listeners)
    return {
        "tokens_per_s": made / wall_s,
        "tokens_per_cpu_s": made / (time.process_time() - before_s),
        "first_p50_s": firsts[len(firsts) // 2],
        "first_p95_s": firsts[int(len(firsts) * 0.95)],
        "gap_p50_ms": 1000 * gaps[len(gaps) // 2],
        "gap_p95_ms": 1000 * gaps[int(len(gaps) * 0.95)],
    }


def run_peft(model: PeftModel, bench: Bench, count: int, *, streams: int) -> dict[str, float]:
    """The same work as one static batch; nothing can join it."""
    options = bench.options
    requests = [bench.request(None, prompt=options.prompt, tokens=options.tokens) for _ in range(streams)]
    prompts = [bench.prompt_ids(request) for request in requests]
    shortest = min(len(ids) for ids in prompts)
    ids_BT = torch.tensor([ids[:shortest] for ids in prompts])
    names = [f"a{number % count}" for number in range(streams)]
    before_s, began = time.process_time(), time.monotonic()
    with torch.inference_mode():
        model.generate(  # type: ignore[no-untyped-call]
            input_ids=ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            adapter_names=names,
            do_sample=False,
            min_new_tokens=options.peft_tokens,
            max_new_tokens=options.peft_tokens,
        )
    made = streams * options.peft_tokens
    cpu_s = time.process_time() - before_s
    return {"tokens_per_s": made / (time.monotonic() - began), "tokens_per_cpu_s": made / cpu_s}


def run_new_adapter(engine: Engine, bench: Bench) -> dict[str, float]:
    """S3: `load_adapter`, then its first token, while 16 streams run on another one."""
    running = [Stream() for _ in range(16)]
    for listener in running:
        engine.submit(bench.request(bench.adapters[0], prompt=64, tokens=100), listener)
    while any(len(listener.times) < 5 for listener in running):
        time.sleep(0.01)
    began = time.monotonic()
    engine.load_adapter(bench.adapters[-1]).result()
    loaded_s = time.monotonic() - began
    new = Stream()
    engine.submit(bench.request(bench.adapters[-1], prompt=64, tokens=4), new)
    new.done.wait()
    ended = time.monotonic()
    for listener in running:
        listener.done.wait()
    pairs = [(a, b - a) for each in running for a, b in zip(each.times, each.times[1:], strict=False)]
    during = [gap for at, gap in pairs if began <= at <= ended]
    return {
        "loaded_s": loaded_s,
        "first_token_s": loaded_s + new.first_s,
        "worst_gap_ms": 1000 * max(during, default=0.0),
        "gap_p50_ms": 1000 * statistics.median(gap for at, gap in pairs if at < began),
    }


def load_peft(bench: Bench) -> PeftModel:
    """Plain peft with all adapters loaded."""
    base = load_base_model(bench.model_dir, quantize_4bit=False, device=CPU, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, bench.adapters[0].path, adapter_name="a0")
    for tuned in bench.adapters[1 : max(bench.options.adapters)]:
        model.load_adapter(tuned.path, adapter_name=tuned.id)
    model.train(False)
    return model


def open_engine(bench: Bench) -> Engine:
    """The engine in exact fp32, as peft."""
    limits = EngineLimits(
        max_batch=max(bench.options.streams, 17), kv_bytes=3 * 10**9, prefix_bytes=0
    )
    engine = Engine(bench.model_dir, limits=limits, device=CPU, dtype=torch.float32)
    engine.start()
    return engine


def show(what: str, figures: dict[str, float]) -> None:
    """One line, at once."""
    print(what, json.dumps({key: round(value, 3) for key, value in figures.items()}), flush=True)


def parse() -> argparse.Namespace:
    """What to measure."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--model", type=Path, default=Path(".venv/models/smollm2-135m-instruct"))
    arguments.add_argument("--adapters", type=int, nargs="+", default=[1, 8, 32])
    arguments.add_argument("--streams", type=int, default=32)
    arguments.add_argument("--prompt", type=int, default=128)
    arguments.add_argument("--tokens", type=int, default=64)
    arguments.add_argument(
        "--peft-tokens", type=int, default=16, help="peft's static batch is slow; 0: not run"
    )
    arguments.add_argument("--runs", type=int, default=3)
    return arguments.parse_args()


def main() -> None:
    """Measure and print."""
    warnings.simplefilter("ignore")
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options.model, Path(folder), options)
        engine = open_engine(bench)
        peft = load_peft(bench) if options.peft_tokens else None
        for tuned in bench.adapters[:-HELD_BACK]:
            engine.load_adapter(tuned).result()
        for _ in range(options.runs):
            for count in options.adapters:
                show(f"S1 ours, {count} adapters", run_engine(engine, bench, count, streams=options.streams))
                if peft is not None:
                    show(f"S1 peft, {count} adapters", run_peft(peft, bench, count, streams=options.streams))
            show("S2 ours", run_engine(engine, bench, 1, streams=1))
        show("S3 ours", run_new_adapter(engine, bench))
        engine.stop()
    print(
        f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MB, all sides together"
    )


if __name__ == "__main__":
    main()

"""The engine alone, in this process, without API or broker; and plain peft, which has neither."""

from __future__ import annotations

import random
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from app.core.completions import CompletionRequest, Failed, Sampling, TunedWeights, WeightsKind, Word
from app.core.manifest import write_manifest
from benchmarks.streams import Answer, message
from worker.base_model import load_base_model, load_tokenizer
from worker.chat_template import ChatTemplate
from worker.serving.engine import Engine, EngineLimits

CPU = torch.device("cpu")
RANK = 16


def make_adapters(folder: Path, model_dir: Path, count: int) -> list[Path]:
    """PEFT folders with random factors in all linear layers, r=16; those that are there are kept."""
    folders = [folder / f"a{number}" for number in range(count)]
    if all((each / "luthier.json").exists() for each in folders):
        return folders
    warnings.simplefilter("ignore")
    base = load_base_model(model_dir, quantize_4bit=False, device=CPU, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear"))
    for number, each in enumerate(folders):
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_A" in name:
                    parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
                elif "lora_B" in name:
                    parameter.normal_(std=0.02, generator=generator)
        model.save_pretrained(str(each))
        write_manifest(each)
    return folders


@contextmanager
def running_engine(model_dir: Path, **limits: int) -> Iterator[Engine]:
    """In exact float32."""
    chosen = {"max_batch": 64, "kv_bytes": 3 * 10**9, "prefix_bytes": 0, **limits}
    engine = Engine(model_dir, limits=EngineLimits(**chosen), device=CPU, dtype=torch.float32)
    engine.start()
    yield engine
    engine.stop()


class _Listener:
    def __init__(self, tokens: int, on_end: Callable[[], None] | None) -> None:
        self.answer = Answer(time.monotonic(), tokens)
        self.done = threading.Event()
        self._on_end = on_end

    def __call__(self, words: list[Word]) -> None:
        now = time.monotonic()
        for word in words:
            if isinstance(word, Failed):
                raise SystemExit(word.message)
            if word.word == "delta":
                self.answer.times.append(now)
            else:
                self.answer.tokens = word.completion_tokens
                self.done.set()
                if self._on_end is not None:
                    self._on_end()


_count = 0


def submit(
    engine: Engine,
    tuned: TunedWeights | None,
    text: str,
    *,
    tokens: int,
    system: str | None = None,
    on_end: Callable[[], None] | None = None,
) -> _Listener:
    """Ask for a greedy answer of exactly `tokens` tokens."""
    global _count
    _count += 1
    messages = [{"role": "system", "content": system}] if system else []
    request = CompletionRequest(
        id=f"bench-{_count}",
        project_id="bench",
        base_model="bench",
        tuned=tuned,
        messages=[*messages, {"role": "user", "content": text}],
        sampling=Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True),
        reply_to="",
        expires_at=time.time() + 3600,
    )
    listener = _Listener(tokens, on_end)
    engine.submit(request, listener)
    return listener


def run(engine: Engine, asked: Sequence[tuple[TunedWeights | None, str]], tokens: int) -> list[Answer]:
    """All at once."""
    listeners = [submit(engine, tuned, text, tokens=tokens) for tuned, text in asked]
    for listener in listeners:
        listener.done.wait()
    return [listener.answer for listener in listeners]


def weights(folders: Sequence[Path], count: int) -> list[TunedWeights]:
    """`count` different adapters; beyond the folders there are, several share one on disk."""
    return [
        TunedWeights(id=f"a{number}", kind=WeightsKind.LORA, path=str(folders[number % len(folders)]))
        for number in range(count)
    ]


def prefix_cache(model_dir: Path, tuned: TunedWeights, *, rounds: int) -> tuple[list[float], list[float]]:
    """First words in seconds of prompts that begin with the same 300 tokens: without and with the cache."""
    found = []
    for prefix_bytes in (0, 256 * 10**6):
        with running_engine(model_dir, prefix_bytes=prefix_bytes) as engine:
            system = message(7, 300)
            firsts = []
            for number in range(rounds + 1):  # the first one fills the cache and loads the adapter
                listener = submit(engine, tuned, message(100 + number, 20), tokens=4, system=system)
                listener.done.wait()
                firsts.append(listener.answer.first_s)
            found.append(firsts[1:])
    return found[0], found[1]


def residency(
    model_dir: Path, folders: Sequence[Path], *, resident: int, stored: Sequence[int], requests: int
) -> Iterator[tuple[int, dict[str, float]]]:
    """Requests for random ones of `stored` adapters while memory holds `resident`: time for each.

    16 at a time, prompts of 64 tokens and 16 to answer. Beyond the folders there are, adapters share files.
    """
    size = (folders[0] / "adapter_model.safetensors").stat().st_size
    for count in stored:
        with running_engine(model_dir, max_batch=16, adapter_bytes=int(resident * size * 1.01)) as engine:
            choose = random.Random(count)
            all_of_them = weights(folders, count)
            for tuned in all_of_them[:resident]:
                engine.load_adapter(tuned).result()
            began = time.monotonic()
            listeners = _sixteen_at_a_time(engine, [choose.choice(all_of_them) for _ in range(requests)])
            firsts = sorted(listener.answer.first_s for listener in listeners)
            yield (
                count,
                {
                    "s_per_request": (time.monotonic() - began) / requests,
                    "first_p50_s": firsts[len(firsts) // 2],
                    "first_p95_s": firsts[int(0.95 * len(firsts))],
                    "in_memory": float(engine.stats().adapters),
                },
            )


def _sixteen_at_a_time(engine: Engine, asked: Sequence[TunedWeights]) -> list[_Listener]:
    gate, listeners = threading.Semaphore(16), []
    for number, tuned in enumerate(asked):
        gate.acquire()
        text = message(number, 24)
        listeners.append(submit(engine, tuned, text, tokens=16, on_end=gate.release))
    for listener in listeners:
        listener.done.wait()
    return listeners


def run_peft(model_dir: Path, folders: Sequence[Path], *, streams: int, prompt: int, tokens: int) -> float:
    """Tokens a second of plain peft over one static batch; nothing can join it."""
    warnings.simplefilter("ignore")
    base = load_base_model(model_dir, quantize_4bit=False, device=CPU, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(folders[0]), adapter_name="a0")
    for number, folder in enumerate(folders[1:], start=1):
        model.load_adapter(str(folder), adapter_name=f"a{number}")
    model.train(False)
    template = ChatTemplate(load_tokenizer(model_dir))
    prompts = [
        template.encode_prompt([{"role": "user", "content": message(number, prompt)}])
        for number in range(streams)
    ]
    shortest = min(map(len, prompts))
    ids_BT = torch.tensor([ids[:shortest] for ids in prompts])
    began = time.monotonic()
    with torch.inference_mode():
        model.generate(  # type: ignore[no-untyped-call]
            input_ids=ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            adapter_names=[f"a{number % len(folders)}" for number in range(streams)],
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
        )
    return streams * tokens / (time.monotonic() - began)

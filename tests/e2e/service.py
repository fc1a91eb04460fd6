"""A whole service for tests: `luthier up` as a user starts it, on a folder and a model of the test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.tiny import build_tiny_model

KEY = "sk-of-the-tests"
START_S = 240
STOP_S = 30


@dataclass(frozen=True)
class Service:
    """Where it listens, and the process to send signals to."""

    base_url: str
    process: subprocess.Popen[str]
    data_dir: Path
    printed: list[str]


def write_catalogue(folder: Path) -> Path:
    """A catalogue with one tiny model, built on the spot."""
    model = build_tiny_model(folder / "tiny")
    file = folder / "models.toml"
    lines = ["[models.tiny]", f'source = "file://{model}"', 'licence = "MIT"']
    lines += ["context_length = 512", "learning_rate = 1e-3", ""]
    file.write_text("\n".join(lines))
    return file


@contextmanager
def running_service(folder: Path, **settings: str) -> Iterator[Service]:
    """`luthier up` until the block ends; `settings` become LUTHIER_ variables."""
    catalogue = folder / "models.toml"
    if not catalogue.exists():
        write_catalogue(folder)
    variables = {"models_file": str(catalogue), "inference_models": "tiny", **settings}
    variables.setdefault("inference_dtype", "float32")  # in it, batches give every row what it gets alone
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LUTHIER_")}
    environment |= {f"LUTHIER_{name.upper()}": value for name, value in variables.items()}
    words = ["up", "--port", "0", "--data-dir", str(folder / "data"), "--api-key", KEY]
    process = subprocess.Popen(
        [sys.executable, "-m", "app.cli.main", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    printed: list[str] = []
    assert process.stdout is not None
    reader = threading.Thread(target=lambda: printed.extend(process.stdout or []), daemon=True)
    reader.start()
    try:
        yield Service(wait_for_url(process, printed), process, folder / "data", printed)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(timeout=STOP_S)
        reader.join(timeout=5)
        process.stdout.close()


def wait_for_url(process: subprocess.Popen[str], printed: list[str]) -> str:
    """The base URL that `up` prints once everything is ready."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        for line in list(printed):
            if line.strip().startswith("base URL"):
                return line.split()[-1]
        assert process.poll() is None, "".join(printed)
        time.sleep(0.1)
    raise AssertionError("not ready:\n" + "".join(printed))

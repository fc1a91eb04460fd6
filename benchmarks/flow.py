"""How long a user waits at the seams of a job: `make bench-flow` on an otherwise idle machine.

Create → running with a warm, idle worker; succeeded → first word of the new model; memory of the API.
Real weights, real processes, the official client. The jobs themselves are as short as jobs can be.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import psutil

MODEL = "smollm2-135m-instruct"
KEY = "sk-of-the-benchmark"
POLL_S = 0.01


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--runs", type=int, default=20)
    arguments.add_argument("--data-dir", type=Path, help="keeps the weights from one call to the next")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder, service(options.data_dir or Path(folder)) as (url, pid):
        client = openai.OpenAI(base_url=url, api_key=KEY)
        file = client.files.create(file=io.BytesIO(training_file()), purpose="fine-tune")
        ask(client, MODEL)
        one_job(client, file.id)  # the first one loads the model into the trainer
        runs = [one_job(client, file.id) for _ in range(options.runs)]
        show("create → running, validation included", [run[0] for run in runs])
        show("succeeded → first word of the new model", [run[1] for run in runs])
        below = psutil.Process(pid).children(recursive=True)
        api = [process for process in below if process.cmdline()[-1:] == ["api"]]
        rss = max(process.memory_info().rss for process in api)
        print(f"memory of the API process: {rss / 2**20:.0f} MB")


def one_job(client: openai.OpenAI, file_id: str) -> tuple[float, float]:
    """Seconds from create to running, and from succeeded to the first word."""
    began = time.monotonic()
    job = client.fine_tuning.jobs.create(
        model=MODEL, training_file=file_id, hyperparameters={"n_epochs": 1, "batch_size": 10}
    )
    running_s = None
    while job.status not in ("succeeded", "failed", "cancelled"):
        time.sleep(POLL_S)
        job = client.fine_tuning.jobs.retrieve(job.id)
        if running_s is None and job.status not in ("validating_files", "queued"):
            running_s = time.monotonic() - began
    if job.status != "succeeded" or running_s is None:
        sys.exit(f"{job.id} {job.status}: {job.error}")
    first_word_s = ask(client, str(job.fine_tuned_model))
    time.sleep(0.5)
    return running_s, first_word_s


def ask(client: openai.OpenAI, model: str) -> float:
    """Seconds to the first word of a streamed answer."""
    began = time.monotonic()
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Say hello."}],
        temperature=0,
        max_tokens=4,
        stream=True,
    )
    first_s = None
    for chunk in stream:
        if first_s is None and chunk.choices and chunk.choices[0].delta.content:
            first_s = time.monotonic() - began
    return first_s if first_s is not None else time.monotonic() - began


def training_file() -> bytes:
    """The smallest file a job takes."""
    turns = [{"role": "user", "content": "Say hello."}, {"role": "assistant", "content": "Hello."}]
    return (json.dumps({"messages": turns}) + "\n").encode() * 10


def show(what: str, seconds: list[float]) -> None:
    """One line."""
    print(f"{what}: median {statistics.median(seconds):.2f} s, worst {max(seconds):.2f} s of {len(seconds)}")


@contextmanager
def service(data_dir: Path) -> Iterator[tuple[str, int]]:
    """`luthier up` on a free port; yields its base URL and process id."""
    words = ["up", "--port", "0", "--data-dir", str(data_dir), "--api-key", KEY]
    process = subprocess.Popen(
        [sys.executable, "-m", "app.cli.main", *words], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="")
            if line.strip().startswith("base URL"):
                yield line.split()[-1], process.pid
                return
        sys.exit("`luthier up` ended before it was ready; the lines above say why.")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


if __name__ == "__main__":
    main()

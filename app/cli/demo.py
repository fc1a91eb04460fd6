"""`luthier demo`: fine-tune the built-in model on the shop example through the API, and show what it learned.

It is an ordinary client: all it knows of the service is the base URL and the key that `up` prints.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import openai
from openai.types.fine_tuning import FineTuningJob
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from app.cli.addresses import local_url
from app.cli.demo_score import Row, Score, read_rows, score
from app.cli.errors import CommandError
from app.cli.process_commands import SOURCE_ROOT, child_environment, leashed, luthier
from app.core.base_models import DEFAULT_BASE_MODEL
from app.core.settings import Settings

EXAMPLE = SOURCE_ROOT / "examples" / "shop"
ANSWER_TOKENS = 90  # the longest right answer has 53
AT_ONCE = 16  # questions asked together; the engine answers them in one batch
SHOWN = 3  # answers shown side by side
STOP_S = 20
POLL_S = 0.5
JOB_S = 3600  # give up after that
_NOISE = re.compile(r"\bWARNING\b|^Luthier is ready")  # kept back unless the start fails


def demo(settings: Settings) -> None:
    """Run the whole story; raises CommandError unless the tuned model beats the base model."""
    console = Console()
    if not EXAMPLE.is_dir():
        raise CommandError(f"{EXAMPLE} is missing; run the demo from a clone of the repository.")
    rows = read_rows((EXAMPLE / "heldout.jsonl").read_text(encoding="utf-8").splitlines())
    began = time.monotonic()
    with running_service(settings.data_dir, console) as (base_url, key):
        console.print(f"Luthier is ready after {time.monotonic() - began:.0f} s at {base_url}")
        client = openai.OpenAI(base_url=base_url, api_key=key)
        began = time.monotonic()
        job = train(client, console)
        trained_s = time.monotonic() - began
        model = str(job.fine_tuned_model)
        before = ask_all(client, DEFAULT_BASE_MODEL, rows, console)
        after = ask_all(client, model, rows, console)
    base, tuned = score(rows, before), score(rows, after)
    console.print(score_table(base, tuned))
    console.print(answer_table(rows, before, after))
    total_s = time.monotonic() - began
    console.print(f"Trained in {trained_s:.0f} s, evaluated in {total_s - trained_s:.0f} s.")
    console.print("\nTry it yourself:")
    for line in lines_to_go_on(settings, key=key, model=model, system=rows[0].system):
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    if not tuned.beats(base):
        raise CommandError("The tuned model is not better than the base model; this should not happen.")


@contextmanager
def running_service(data_dir: Path, console: Console) -> Iterator[tuple[str, str]]:
    """`luthier up` on a free port, as a process of its own; yields its base URL and key."""
    argv = luthier("up", "--port", "0", "--data-dir", str(data_dir))
    process = subprocess.Popen(
        leashed(argv, options=("--grace", str(STOP_S))),  # ends with us, however we end
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=child_environment({}),
    )
    assert process.stdin is not None
    try:
        address = _read_address(process, console)
        assert process.stdout is not None
        threading.Thread(
            target=deque, args=(process.stdout, 0), daemon=True
        ).start()  # a full pipe would stop it
        yield address
    finally:
        process.stdin.close()
        process.wait()


def train(client: openai.OpenAI, console: Console) -> FineTuningJob:
    """Upload, create the job, and show it at work until it has succeeded."""
    file = client.files.create(file=EXAMPLE / "train.jsonl", purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=DEFAULT_BASE_MODEL,
        training_file=file.id,
        suffix="shop",
        seed=7,
        # One pass more than "auto": with three, 2 of 44 answers lost the form (docs/benchmarks.md).
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 4}}},
    )
    console.print(f"Uploaded {file.id}, created {job.id}")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeElapsedColumn(),
    )
    deadline = time.monotonic() + JOB_S
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("validating files", total=None, numbers="")
        while time.monotonic() < deadline:
            job = client.fine_tuning.jobs.retrieve(job.id)
            if job.status in ("succeeded", "failed", "cancelled"):
                break
            _show(client, job, progress=progress, bar=bar)
            time.sleep(POLL_S)
    if job.status != "succeeded":
        reason = job.error.message if job.error else f"it is still {job.status}"
        raise CommandError(f"The job {job.id} did not succeed: {reason}.")
    console.print(f"{job.fine_tuned_model} is ready ({job.trained_tokens} tokens trained)")
    return job


def ask_all(client: openai.OpenAI, model: str, rows: list[Row], console: Console) -> list[str]:
    """The model's greedy answer to every row."""

    def ask(row: Row) -> str:
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "system", "content": row.system}, {"role": "user", "content": row.message}],
            temperature=0,
            max_completion_tokens=ANSWER_TOKENS,
        )
        return answer.choices[0].message.content or ""

    with (
        Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=console
        ) as progress,
        ThreadPoolExecutor(AT_ONCE) as pool,
    ):
        bar = progress.add_task(f"asking {model}", total=len(rows))
        answers = []
        for answer in pool.map(ask, rows):
            answers.append(answer)
            progress.advance(bar)
    return answers


def score_table(base: Score, tuned: Score) -> Table:
    """Both models over all rows."""
    table = Table(title=f"{base.rows} held-out messages")
    table.add_column("")
    table.add_column("base", justify="right")
    table.add_column("tuned", justify="right")
    titles = {
        "valid_json": "valid JSON",
        "right_keys": "the right keys",
        "right_intent": "intent right",
        "right_urgency": "urgency right",
        "right_product": "product right",
    }
    for name, title in titles.items():
        table.add_row(title, f"{base.share(name):.0%}", f"{tuned.share(name):.0%}")
    return table


def answer_table(rows: list[Row], before: list[str], after: list[str]) -> Table:
    """A few answers side by side."""
    table = Table(title="Side by side", show_lines=True)
    for title in ("message", "base", "tuned"):
        table.add_column(title, ratio=1)
    for row, base, tuned in list(zip(rows, before, after, strict=True))[:SHOWN]:
        table.add_row(_plain(row.message), _plain(base.strip()[:300]), _plain(tuned))
    return table


def lines_to_go_on(settings: Settings, *, key: str, model: str, system: str) -> list[str]:
    """Two lines for a shell: `up` on the same data, then a question to the tuned model."""
    port = settings.port or 8000
    up = [*own_command(), "up", "--data-dir", str(settings.data_dir)]
    up += [] if settings.port else ["--port", str(port)]
    question = "My bell fell off on the first ride, what now?"
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    curl = ["curl", f"{local_url(settings.host, port)}/v1/chat/completions"]
    curl += ["-H", f"Authorization: Bearer {key}", "-H", "Content-Type: application/json"]
    curl += ["-d", json.dumps({"model": model, "messages": messages})]
    return [shlex.join(up), shlex.join(curl)]


def own_command() -> list[str]:
    """How this very command was called, to be typed again from the current folder."""
    program = Path(sys.argv[0])
    if program.suffix == ".py":  # python -m app.cli.main
        return [sys.executable, "-m", "app.cli.main"]
    if not program.is_absolute():
        return [sys.argv[0]]
    inside = program.is_relative_to(Path.cwd())
    return [str(program.relative_to(Path.cwd()) if inside else program)]


def _read_address(process: subprocess.Popen[str], console: Console) -> tuple[str, str]:
    """What `up` prints, passed on until it is ready; its warnings only when it never is."""
    assert process.stdout is not None
    found: dict[str, str] = {}
    kept_back = []
    for line in process.stdout:
        for name in ("base URL", "API key"):
            if line.strip().startswith(name):
                found[name] = line.strip().removeprefix(name).strip()
        if len(found) == 2:
            return found["base URL"], found["API key"]
        if _NOISE.search(line):
            kept_back.append(line)
        elif line.strip():
            console.print(line.rstrip(), markup=False, highlight=False)
    for line in kept_back:
        console.print(line.rstrip(), markup=False, highlight=False)
    raise CommandError("`luthier up` ended before it was ready; the lines above say why.")


def _show(client: openai.OpenAI, job: FineTuningJob, *, progress: Progress, bar: TaskID) -> None:
    if job.status != "running":
        progress.update(bar, description=job.status.replace("_", " "))
        return
    for event in client.fine_tuning.jobs.list_events(job.id, limit=5).data:
        data = event.data if event.type == "metrics" and isinstance(event.data, dict) else None
        if data is not None:
            break
    else:
        progress.update(bar, description="loading")
        return
    left = "" if job.estimated_finish is None else f"{max(0, job.estimated_finish - int(time.time()))} s left"
    pace = data["luthier"]
    numbers = f"loss {data['train_loss']:.2f}  {pace['tokens_per_second']:.0f} tokens/s  {left}"
    progress.update(
        bar,
        description="training",
        completed=data["step"],
        total=data["total_steps"],
        numbers=numbers,
    )


def _plain(text: str) -> str:
    """Text that rich shows as it is."""
    return text.replace("[", "\\[")

"""Tokens a second of training against TRL, the same rows in the same order of turns: `make bench-train`.

First both train the same batches from the same adapter and their losses must agree; then they take turns of
a few steps each, so that whatever else the machine does falls on both. Real tokens count, padding does not.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from worker.chat_template import ChatTemplate, TokenizedExample
from worker.training.data import epoch_batches, read_split
from worker.training.loop import train
from worker.training.model import WarmBase, tuned_model
from worker.training.step import StepPlan, train_step
from worker.training.words import Adapter, Failed, StepDone, TrainSpec

T = TypeVar("T")
RATE = 1e-3
CHECKED_STEPS = 2
LARGEST_DIFFERENCE = 1e-3  # nats a token
TEXT = (
    "order invoice parcel kettle refund urgent customer please where morning number street broken window "
    "return answer without account payment later simple garden delivery colour before thank reply station"
)


@dataclass(frozen=True)
class Work:
    """One benchmark: what its rows look like."""

    name: str
    rows: int
    batch_size: int
    peer_rows: (
        int  # of the peer's forward passes; the rest of its batch by accumulation, else memory runs out
    )
    common_words: int = 0  # of a system prompt that all rows begin with

    def write(self, path: Path, rows: int) -> None:
        """Write the first `rows` rows as OpenAI's JSONL."""
        rng = random.Random(7)
        system = _words(rng, self.common_words)
        with path.open("w") as file:
            for _ in range(rows):
                words = 74 if system else round(min(900, max(30, rng.lognormvariate(5.0, 0.8)))) - 25
                asked = max(3, round(words * rng.uniform(0.4, 0.8)))
                turns = [{"role": "system", "content": system}] if system else []
                turns.append({"role": "user", "content": _words(rng, asked)})
                turns.append({"role": "assistant", "content": _words(rng, max(3, words - asked))})
                file.write(json.dumps({"messages": turns}) + "\n")


WORKS = {
    "b1": Work("B1 chat rows of 30 to 900 tokens", rows=400, batch_size=8, peer_rows=4),
    "b2": Work("B2 700 common tokens, 100 own", rows=256, batch_size=16, peer_rows=2, common_words=680),
}


@dataclass
class Side:
    """What one side has done so far."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    tokens: int = 0
    losses: list[float] = field(default_factory=list)

    def add(self, turn: dict[str, Any]) -> None:
        self.wall_s += turn["wall_s"]
        self.cpu_s += turn["cpu_s"]
        self.tokens += turn["tokens"]
        self.losses += turn["losses"]


class Peer:
    """The peer's process."""

    def __init__(self, python: Path, folder: Path, mode: str) -> None:
        script = Path(__file__).with_name("train_peer.py")
        self._process = subprocess.Popen(
            [str(python), str(script), str(folder), mode],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def steps(self, count: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            sys.exit(
                f"The peer ended with {self._process.wait()} before it was done; the lines above say why."
            )
        turn: dict[str, Any] = json.loads(line)
        return turn

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("works", nargs="*", choices=[*WORKS, []], help="which; all without a word")
    parser.add_argument("--model-dir", type=Path, required=True)
    parser.add_argument("--peer-python", type=Path, required=True)
    parser.add_argument("--rows", type=int, help="fewer rows than the benchmark has, for development")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--turn", type=int, default=2, help="steps before the other side has its turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer-padding-free", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.works or WORKS:
        with tempfile.TemporaryDirectory() as folder:
            run(options, WORKS[name], Path(folder))


def run(options: argparse.Namespace, work: Work, folder: Path) -> None:
    """One benchmark: check, then measure in turns."""
    work.write(folder / "train.jsonl", options.rows or work.rows)
    spec = TrainSpec(
        job_id="ftjob-bench",
        attempt=1,
        base_model_dir=str(options.model_dir),
        training_file=str(folder / "train.jsonl"),
        output_dir=str(folder / "attempt"),
        adapter=Adapter.LORA,
        n_epochs=options.epochs,
        batch_size=work.batch_size,
        learning_rate=RATE,
    )
    warm = WarmBase(torch.device("cpu"), torch.float32)
    examples = read_examples(spec, warm)
    lengths = sorted(len(example.ids) for example in examples)
    labels = sum(sum(example.is_label) for example in examples)
    print(f"{work.name}: {len(lengths)} rows of {lengths[0]} to {lengths[-1]} tokens, {sum(lengths)} in all,")
    print(f"{labels / sum(lengths):.0%} of them trained; batch {work.batch_size}, {options.threads} threads")
    numbers = {
        "model_dir": str(options.model_dir),
        "threads": options.threads,
        "batch_size": work.peer_rows,
        "accumulation": work.batch_size // work.peer_rows,
        "rate": RATE,
        "epochs": options.epochs,
        "padding_free": options.peer_padding_free,
        "rows": [
            (list(e.ids), [i if y else -100 for i, y in zip(e.ids, e.is_label, strict=True)])
            for e in examples
        ],
    }
    (folder / "work.json").write_text(json.dumps(numbers))
    check(options, spec, warm, examples, folder)
    measure(options, spec, warm, examples, folder)


def read_examples(spec: TrainSpec, warm: WarmBase) -> list[TokenizedExample]:
    """The rows as both sides see them."""
    template = ChatTemplate(warm.tokenizer(spec.base_model_dir))
    reading = read_split(
        spec.training_file, "training_file", template=template, max_length=2048, max_line_bytes=2**20
    )
    return result(reading).examples


def result(words: Generator[Any, None, T]) -> T:
    """What a generator returns in the end."""
    while True:
        try:
            next(words)
        except StopIteration as stop:
            value: T = stop.value
            return value


def check(
    options: argparse.Namespace,
    spec: TrainSpec,
    warm: WarmBase,
    examples: Sequence[TokenizedExample],
    folder: Path,
) -> None:
    """Both sides train the same few batches from the same adapter; ends the run where they differ."""
    (folder / "init").mkdir()
    with tuned_model(spec, warm) as tuned:
        tuned.save(folder / "init")
        tuned.model.train()
        optimizer = torch.optim.AdamW(tuned.parameters, lr=RATE, weight_decay=0.0, fused=True)
        size = spec.batch_size
        batches = [
            examples[start * size :][:size] for start in range(min(CHECKED_STEPS, len(examples) // size))
        ]
        plan = StepPlan(step=1, rate=RATE, stop=threading.Event())
        ours = [result(train_step(tuned, optimizer, batch, plan))[0] for batch in batches]
    peer = Peer(options.peer_python, folder, "check")
    theirs = peer.steps(len(ours))["losses"]
    peer.end()
    difference = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    print("losses of the same batches, ours:", *(f"{loss:.5f}" for loss in ours))
    print("                           peer's:", *(f"{loss:.5f}" for loss in theirs))
    if difference > LARGEST_DIFFERENCE:
        sys.exit(f"They differ by {difference:.2g}: nothing to compare.")


def measure(
    options: argparse.Namespace,
    spec: TrainSpec,
    warm: WarmBase,
    examples: Sequence[TokenizedExample],
    folder: Path,
) -> None:
    """Turns of both sides until the rows are through, ours end to end with checkpoints."""
    steps = len(list(epoch_batches(examples, spec.batch_size, seed=0, epoch=1))) * spec.n_epochs
    ours, theirs = Side(), Side()
    words = training(spec, warm)
    peer = Peer(options.peer_python, folder, "run")
    done = 0
    while done < steps:
        count = min(options.turn, steps - done)
        ours.add(take_turn(words, count))
        theirs.add(peer.steps(count))
        done += count
        show(done, steps, ours, theirs)
    for _ in words:  # the last checkpoint
        pass
    peer.end()


def training(spec: TrainSpec, warm: WarmBase) -> Iterator[StepDone]:
    """The steps of the real loop; its own failure ends the run."""
    for word in train(spec, warm):
        if isinstance(word, Failed):
            sys.exit(word.message)
        if isinstance(word, StepDone):
            yield word


def take_turn(words: Iterator[StepDone], count: int) -> dict[str, Any]:
    """Let the loop do `count` steps."""
    began = time.monotonic(), time.process_time()
    done = [next(words) for _ in range(count)]
    return {
        "wall_s": time.monotonic() - began[0],
        "cpu_s": time.process_time() - began[1],
        "tokens": sum(step.tokens for step in done),
        "losses": [step.metrics.train_loss for step in done],
    }


def show(done: int, steps: int, ours: Side, theirs: Side) -> None:
    """The state after a turn; the last line is the result."""
    rates = ours.tokens / ours.wall_s, theirs.tokens / theirs.wall_s
    per_cpu = ours.tokens / ours.cpu_s, theirs.tokens / theirs.cpu_s
    last = [sum(side.losses[-8:]) / len(side.losses[-8:]) for side in (ours, theirs)]
    print(
        f"step {done}/{steps}: tokens a second {rates[0]:.0f} : {rates[1]:.0f} = {rates[0] / rates[1]:.2f}; "
        f"a CPU second {per_cpu[0]:.0f} : {per_cpu[1]:.0f} = {per_cpu[0] / per_cpu[1]:.2f}; "
        f"loss of the last steps {last[0]:.3f} : {last[1]:.3f}",
        flush=True,
    )


def _words(rng: random.Random, count: int) -> str:
    words = TEXT.split()
    return " ".join(rng.choice(words) for _ in range(count))


if __name__ == "__main__":
    main()

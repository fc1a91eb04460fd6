"""B5: how memory and time grow with the work, and whether memory is what was predicted: `make bench-memory`.

Each case trains a few real steps in a process of its own, whose largest resident size is compared with what
`app/core/memory.py` says of the same rows. Sequence length grows with the same tokens a step, then tokens.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

TOKENS_A_STEP = 4096
LENGTHS = (256, 512, 1024, 2048, 4096)
TIMES = (1, 2, 4, 8)
MEMORY_BAR, TIME_BAR = 0.15, 0.10
WORDS = (
    "order invoice parcel kettle refund urgent customer please where morning number street broken window "
    "return answer without account payment later simple garden delivery colour before thank reply station"
)


@dataclass(frozen=True)
class Case:
    """One run."""

    name: str
    length: int  # tokens of every row
    batch_size: int
    steps: int
    adapter: str = "lora"


def cases(adapter: str) -> list[Case]:
    """All of them: the same tokens a step in longer rows, then more steps of the same."""
    grown = [Case(f"length {length}", length, TOKENS_A_STEP // length, 3, adapter) for length in LENGTHS]
    return grown + [Case(f"tokens x{times}", 512, 4, 2 * times, adapter) for times in TIMES]


def write_rows(path: Path, case: Case) -> None:
    """Rows of more than `length` tokens, which `max_length` cuts to it; three in ten tokens are trained."""
    rng = random.Random(7)
    with path.open("w") as file:
        for number in range(case.batch_size * case.steps):
            asked, answer = (" ".join(rng.choices(WORDS.split(), k=case.length)) for _ in range(2))
            turns = [
                {"role": "system", "content": f"{number}"},
                {"role": "user", "content": " ".join(asked.split()[: case.length * 6 // 10])},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")


def main() -> None:
    """Measure all cases, each in a process of its own, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-dir", type=Path, required=True)
    parser.add_argument("--adapter", choices=["lora", "qlora", "full"], default="lora")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", help="the cases whose name begins so")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run(Case(**json.loads(options.case)), options.model_dir, options.threads)))
        return
    print("case            predicted  measured  ratio   ms a token")
    done = [
        (case, measured(case, options))
        for case in cases(options.adapter)
        if case.name.startswith(options.only or "")
    ]
    judge(done)


def measured(case: Case, options: argparse.Namespace) -> dict[str, float]:
    """One case in a new process; prints its line."""
    command = [sys.executable, __file__, "--case", json.dumps(asdict(case))]
    command += ["--model-dir", str(options.model_dir), "--threads", str(options.threads)]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    found: dict[str, float] = json.loads(out.splitlines()[-1])
    ratio = found["predicted"] / found["peak"]
    print(
        f"{case.name:14} {found['predicted'] / 1e6:7.0f} MB {found['peak'] / 1e6:6.0f} MB"
        f"  {ratio:5.2f}  {1000 * found['s_a_token']:8.2f}",
        flush=True,
    )
    return found


def judge(done: list[tuple[Case, dict[str, float]]]) -> None:
    """Say whether the bars are met."""
    worst = max(abs(found["predicted"] / found["peak"] - 1) for _, found in done)
    print(f"memory: worst prediction off by {worst:.0%}; bar {MEMORY_BAR:.0%}")
    for kind in ("length", "tokens"):
        times = [found["s_a_token"] for case, found in done if case.name.startswith(kind)]
        if len(times) > 1:
            spread = max(times) / min(times) - 1
            print(f"time a token over {kind}: {spread:.0%} between least and most; bar {TIME_BAR:.0%}")


def run(case: Case, model_dir: Path, threads: int) -> dict[str, float]:
    """Train the case here; the prediction comes first, from the rows as the trainer reads them."""
    import torch

    from app.core.memory import Device, Method, Workload
    from app.core.shapes import read_shape
    from benchmarks.train import result
    from worker.chat_template import ChatTemplate
    from worker.training.data import read_split
    from worker.training.loop import train
    from worker.training.model import WarmBase
    from worker.training.rows import rows_of
    from worker.training.words import Adapter, Failed, StepDone, TrainSpec

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder) / "train.jsonl", case)
        spec = TrainSpec(
            job_id="ftjob-bench",
            attempt=1,
            base_model_dir=str(model_dir),
            training_file=f"{folder}/train.jsonl",
            output_dir=f"{folder}/attempt",
            adapter=Adapter(case.adapter),
            n_epochs=1,
            batch_size=case.batch_size,
            max_length=case.length,
        )
        warm = WarmBase(torch.device("cpu"), torch.float32)
        reading = read_split(
            spec.training_file,
            "training_file",
            template=ChatTemplate(warm.tokenizer(spec.base_model_dir)),
            max_length=spec.max_length,
            max_line_bytes=spec.max_line_bytes,
        )
        split = result(reading)
        shape = read_shape(model_dir)
        assert shape is not None
        rows = rows_of([(e.ids, sum(e.is_label)) for e in split.examples], shares=True)
        work = Workload(shape, Method(case.adapter, rank=spec.rank), rows, case.batch_size, split.tokens)
        times, before, tokens = [], 0.0, 1
        for word in train(spec, warm):
            if isinstance(word, Failed):
                sys.exit(word.message)
            if isinstance(word, StepDone):
                times.append((word.elapsed_s - before) / word.tokens)
                before, tokens = word.elapsed_s, word.tokens
    assert tokens
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if sys.platform == "linux" else 1)
    seconds = median(times[1:])  # the first one also touches every page of memory for the first time
    return {"predicted": work.peak_bytes(Device()), "peak": peak, "s_a_token": seconds}


if __name__ == "__main__":
    main()

"""`python -m tests.chaos`: break a private service on purpose and tell what came of it.

Without options: faults in an order that the seed decides, for ten minutes. Exit code 0: every fault met its
bar. All is on loopback, bounded in count and time, and ends by itself.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos.control_group import run_control_group
from tests.chaos.faults import Fault
from tests.chaos.matrix import ALL
from tests.chaos.report import closing, table
from tests.chaos.run import Result, say, try_faults
from tests.chaos.service import Service
from tests.chaos.soak import soak

LAST_START_S = 480.0  # of a choice that has ten minutes: no fault begins later


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--faults", help="ids separated by commas")
    parser.add_argument("--n", type=int, help="runs of each fault")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--all", action="store_true", help="every fault in full, then the control group")
    parser.add_argument("--control", action="store_true", help="only the control group")
    parser.add_argument("--soak", type=float, metavar="SECONDS", help="random faults for so long")
    parser.add_argument("--folder", type=Path, help="a new folder for logs and data; kept")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Run, print, and say by the exit code whether all bars were met."""
    options = parse(arguments)
    names = options.faults.split(",") if options.faults else []
    unknown = [name for name in names if name not in ALL]
    if unknown:
        say(f"no such fault: {', '.join(unknown)}; there are {', '.join(sorted(ALL))}")
        return 2
    folder = options.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    if options.folder:
        folder.mkdir(parents=True)  # a new one: the storage's volume does not outlive a run
    folder.chmod(0o711)  # PostgreSQL runs as a user of its own
    ok = True
    if not options.control:
        ok = run_faults(options, folder, [ALL[name] for name in names])
    if options.control or options.all:
        run_control_group(folder / "stock")
    return 0 if ok else 1


def run_faults(options: argparse.Namespace, folder: Path, named: list[Fault]) -> bool:
    """On one service, from its start to its end."""
    service = Service(folder)
    began = time.monotonic()
    flat = True
    try:
        service.start()
        say(f"ready after {time.monotonic() - began:.0f} s in {folder}")
        if options.soak:
            results, flat = soak(service, seconds=options.soak, seed=options.seed)
        elif named or options.all:
            faults = named or [ALL[name] for name in sorted(ALL)]
            results = try_faults(service, faults, seed=options.seed, n=options.n, whole=options.all)
        else:
            results = try_a_choice(service, options)
    finally:
        service.stop()
    (folder / "results.md").write_text(table(results))
    say(closing(results, time.monotonic() - began))
    return flat and all(result.ok for result in results)


def try_a_choice(service: Service, options: argparse.Namespace) -> list[Result]:
    """Faults in an order by chance, as many as ten minutes hold."""
    faults = [ALL[name] for name in sorted(ALL)]
    random.Random(options.seed).shuffle(faults)
    until = time.monotonic() + LAST_START_S
    results: list[Result] = []
    for fault in faults:
        if time.monotonic() > until:
            break
        results += try_faults(service, [fault], seed=options.seed, n=options.n, whole=False)
    return results


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

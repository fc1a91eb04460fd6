"""`python -m tests.chaos`: break a private service on purpose and tell what came of it.

Exit code 0: every fault met its bar. All is on loopback, bounded in count and time, and ends by itself.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos import matrix
from tests.chaos.run import Result, say, try_faults
from tests.chaos.service import Service


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--faults", help="ids separated by commas; all of them when absent")
    parser.add_argument("--n", type=int, help="runs of each fault")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--all", action="store_true", help="every fault with its full number of runs")
    parser.add_argument("--folder", type=Path, help="a new folder for logs and data; kept")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Run, print, and say by the exit code whether all bars were met."""
    options = parse(arguments)
    names = options.faults.split(",") if options.faults else sorted(matrix.ALL)
    unknown = [name for name in names if name not in matrix.ALL]
    if unknown:
        say(f"no such fault: {', '.join(unknown)}; there are {', '.join(sorted(matrix.ALL))}")
        return 2
    folder = options.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    if options.folder:
        folder.mkdir(parents=True)  # a new one: the storage's volume does not outlive a run
    folder.chmod(0o711)  # PostgreSQL runs as a user of its own
    service = Service(folder)
    began = time.monotonic()
    try:
        service.start()
        say(f"ready after {time.monotonic() - began:.0f} s in {folder}")
        results = try_faults(
            service, [matrix.ALL[name] for name in names], seed=options.seed, n=options.n, whole=options.all
        )
    finally:
        service.stop()
    tell_sum(results, time.monotonic() - began)
    return 0 if all(result.ok for result in results) else 1


def tell_sum(results: list[Result], seconds: float) -> None:
    """The last line."""
    failed = [result.fault.id for result in results if not result.ok]
    skipped = [result.fault.id for result in results if result.run.skipped]
    say(
        f"{len(results)} faults, {sum(r.run.runs for r in results)} runs, "
        f"{sum(len(r.run.jobs) for r in results)} jobs, lost {sum(len(r.lost) for r in results)}, "
        f"doubled {sum(len(r.doubled) for r in results)}, {seconds:.0f} s; "
        f"failed: {', '.join(failed) or 'none'}" + (f"; skipped: {', '.join(skipped)}" if skipped else "")
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

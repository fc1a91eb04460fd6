"""Results as a table for docs/reliability.md, and the closing line of a run."""

from __future__ import annotations

from collections.abc import Sequence

from tests.chaos.run import Result

HEAD = (
    "| fault | bar | runs | jobs | lost | doubled | worst, in leases | outcome |\n"
    "|---|---|---|---|---|---|---|---|\n"
)


def table(results: Sequence[Result]) -> str:
    """One row for each fault, what failed told in its row."""
    return HEAD + "".join(_row(result) for result in results)


def _row(result: Result) -> str:
    run, fault = result.run, result.fault
    worst = "–" if run.worst_leases is None else f"{run.worst_leases:.2f}"
    outcome = f"skipped: {run.skipped}" if run.skipped else "met" if result.ok else "**failed**"
    reasons = [*run.failures, *result.lost, *result.doubled, *result.wrong]
    words = "; ".join([outcome, *run.notes, *reasons[:3]]).replace("|", "/")
    counts = f"{run.runs} | {len(run.jobs)} | {len(result.lost)} | {len(result.doubled)} | {worst}"
    return f"| {fault.id} {fault.title} | {fault.bar} | {counts} | {words} |\n"


def closing(results: Sequence[Result], seconds: float) -> str:
    """The sum of it all."""
    failed = [result.fault.id for result in results if not result.ok]
    skipped = [result.fault.id for result in results if result.run.skipped]
    return (
        f"{len(results)} faults, {sum(r.run.runs for r in results)} runs, "
        f"{sum(len(r.run.jobs) for r in results)} jobs, lost {sum(len(r.lost) for r in results)}, "
        f"doubled {sum(len(r.doubled) for r in results)}, {seconds:.0f} s; "
        f"failed: {', '.join(failed) or 'none'}" + (f"; skipped: {', '.join(skipped)}" if skipped else "")
    )

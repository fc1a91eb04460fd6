"""Tries faults one after another on one service and tells each in a line."""

from __future__ import annotations

import importlib.util
import random
import shutil
import sys
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass

from tests.chaos import truth
from tests.chaos.faults import Fault, Run
from tests.chaos.service import Service, run_luthier
from tests.chaos.workload import Tenant

LEFTOVER = ("note I10 files/", "note I10 tmp/", "note I10 weights/")  # housekeeping removes them by age


@dataclass
class Result:
    """What a fault came to."""

    fault: Fault
    run: Run
    lost: list[str]
    doubled: list[str]
    wrong: list[str]
    seconds: float

    @property
    def ok(self) -> bool:
        return not (self.lost or self.doubled or self.wrong or self.run.failures)

    def line(self, seed: int) -> str:
        """One line for a terminal."""
        run = self.run
        if run.skipped:
            return f"{self.fault.id}  skipped: {run.skipped}"
        worst = "-" if run.worst_leases is None else f"{run.worst_leases:.2f}"
        words = [
            f"{self.fault.id}  seed={seed} runs={run.runs} jobs={len(run.jobs)} lost={len(self.lost)}",
            f"doubled={len(self.doubled)} worst={worst} leases {self.seconds:.0f} s",
            "ok" if self.ok else "FAILED",
            self.fault.title,
            *(f"[{note}]" for note in run.notes),
        ]
        reasons = [*run.failures, *self.lost, *self.doubled, *self.wrong]
        return "  ".join(words) + "".join(f"\n     - {reason}" for reason in reasons[:12])


def try_faults(
    service: Service, faults: Iterable[Fault], *, seed: int, n: int | None, whole: bool
) -> list[Result]:
    """Every fault in turn, the service whole again between them; a line each as it ends."""
    results = []
    tenants = (
        Tenant(service.base_url, service.key("default"), "default"),
        Tenant(service.base_url, service.key("other"), "other"),
    )
    for fault in faults:
        result = try_fault(
            service, fault, tenants, seed=seed, n=n or (fault.n_all if whole else fault.n), whole=whole
        )
        say(result.line(seed))
        if not result.ok:
            say(f"     again: python -m tests.chaos --faults {fault.id} --seed {seed} --n {result.run.n}")
            say(f"     logs:  {service.folder}/logs")
        results.append(result)
    for tenant in tenants:
        tenant.close()
    return results


def try_fault(
    service: Service, fault: Fault, tenants: tuple[Tenant, Tenant], *, seed: int, n: int, whole: bool
) -> Result:
    """Inject, heal, wait for quiet, examine."""
    run = Run(service, tenants, random.Random(f"{seed} {fault.id}"), n, whole)
    for tenant in tenants:
        tenant.answers.clear()
        tenant.slowest_s = 0.0
    began = time.monotonic()
    findings = truth.Findings()
    try:
        service.wait_ready()
        fault.inject(run)
    except Exception as error:  # told in the line; the next fault still gets its turn
        run.failures.append(f"{type(error).__name__}: {error}")
        traceback.print_exc()
    try:
        service.heal()
        service.wait_ready()
        run.finish()
        settle(service)
        findings = truth.examine(service, tenants, run.jobs, failed=run.may_fail)
        for tenant in tenants:
            if tenant.answers["500"]:
                run.failures.append(f"{tenant.answers['500']} answers were 500")
            if tenant.answers["503 without retry-after"]:
                run.failures.append("a 503 came without retry-after")
        if not run.skipped and importlib.util.find_spec("app.core.fsck"):
            code, said = run_luthier(service, "fsck", "--strict")
            lines = said.splitlines()
            leftovers = [line for line in lines if line.startswith(LEFTOVER)]
            wrong = [line for line in lines[:-1] if line not in leftovers]
            if code != 0 and (wrong or not leftovers):
                findings.wrong.extend(f"fsck: {line[:300]}" for line in wrong[:6] or lines[:6])
            elif leftovers:
                run.notes.append(f"{len(leftovers)} leftovers of killed writers wait for their age")
                drop(service, leftovers)
    except Exception as error:
        run.failures.append(f"after the fault: {type(error).__name__}: {error}")
        traceback.print_exc()
    return Result(fault, run, findings.lost, findings.doubled, findings.wrong, time.monotonic() - began)


def settle(service: Service, *, timeout_s: float = 10.0) -> None:
    """Let housekeeping end: nothing deleted has bytes, no folder of an attempt is left."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        open_rows = truth.rows(
            service.engine,
            "SELECT 1 FROM tuned_models WHERE deleted_at IS NOT NULL AND purged_at IS NULL LIMIT 1",
        )
        if not open_rows and not any((service.storage / "attempts").iterdir()):
            return
        time.sleep(0.1)


def drop(service: Service, leftovers: list[str]) -> None:
    """Remove what housekeeping would by its age, so that no later fault is blamed for it."""
    for line in leftovers:
        path = service.storage / line.split()[2].rstrip(":")
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def say(line: str) -> None:
    """To the terminal, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()

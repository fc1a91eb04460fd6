"""What a fault is: an injection with a bar, and the tools all of them share. The faults stand beside this."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.chaos import truth
from tests.chaos.parts import Part
from tests.chaos.service import LEASE_S, TRAINING, Service
from tests.chaos.workload import QUIET, Tenant

QUIET_S = 120.0


@dataclass(frozen=True, slots=True)
class Fault:
    """One row of the matrix."""

    id: str
    title: str
    bar: str
    n: int  # runs in `make chaos`
    n_all: int  # runs in `make chaos-all`
    inject: Callable[[Run], None]


@dataclass
class Run:
    """One fault being tried: the service, a seeded source of chance, and what came of it."""

    service: Service
    tenants: tuple[Tenant, Tenant]
    chance: random.Random
    n: int
    whole: bool = False  # the full length of the matrix, for faults that last
    runs: int = 0
    jobs: set[str] = field(default_factory=set)
    may_fail: set[str] = field(default_factory=set)  # jobs whose failure is the point
    recoveries_s: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: str = ""

    @property
    def tenant(self) -> Tenant:
        """The first project's user."""
        return self.tenants[0]

    def start_jobs(self, count: int, *, steps: int = 6, **luthier: object) -> list[str]:
        """So many jobs of the first project."""
        made = [self.tenant.create(steps=steps, **luthier) for _ in range(count)]
        self.jobs.update(made)
        return made

    def start_job(self, *, steps: int = 6, **luthier: object) -> str:
        """One job."""
        return self.start_jobs(1, steps=steps, **luthier)[0]

    def rounds(self) -> Iterator[int]:
        """One turn for each run; the service is whole again before the next."""
        for number in range(self.n):
            yield number
            self.runs += 1

    def check(self, holds: bool, otherwise: str) -> bool:
        """Note what does not hold."""
        if not holds:
            self.failures.append(otherwise)
        return holds

    def wait_step(self, job: str, *, after: int = 0, timeout_s: float = 60.0) -> truth.Step:
        """Until the trainer has begun more than `after` steps of the job, all attempts together."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            seen = truth.steps(self.service, job)
            if len(seen) > after:
                return seen[-1]
            time.sleep(0.01)
        raise TimeoutError(f"{job} trained no step beyond {after} in {timeout_s:g} s")

    def worker_of(self, job: str) -> Part:
        """The training worker that holds a running job."""
        [row] = truth.rows(self.service.engine, "SELECT worker, status FROM jobs WHERE id = :job", job=job)
        for name in TRAINING:
            if self.service.is_named(name, str(row.worker)):
                return self.service.parts[name]
        raise LookupError(f"{job} is {row.status}, held by {row.worker}")

    def wait_attempt(self, job: str, *, beyond: int, since: float, timeout_s: float = 60.0) -> None:
        """Until a later attempt has begun, and note how long that took."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            begun = [at for number, at in truth.claims(self.service, job).items() if number > beyond]
            if begun:
                self.recoveries_s.append(min(begun).timestamp() - since)
                return
            time.sleep(0.05)
        self.failures.append(f"{job}: no attempt after {beyond} in {timeout_s:g} s")

    def mend(self, seconds: float) -> None:
        """Start again what ended, as a supervisor does, for so long."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for part in self.service.parts.values():
                part.start()
            time.sleep(0.2)

    def finish(self, jobs: list[str] | set[str] | None = None, *, timeout_s: float = QUIET_S) -> None:
        """Until these jobs are final or paused."""
        open_jobs = set(jobs if jobs is not None else self.jobs)
        deadline = time.monotonic() + timeout_s
        while open_jobs and time.monotonic() < deadline:
            found = truth.rows(
                self.service.engine, "SELECT id, status FROM jobs WHERE id = ANY(:ids)", ids=list(open_jobs)
            )
            open_jobs -= {row.id for row in found if row.status in QUIET}
            self.mend(0.1)
        if open_jobs:
            self.failures.append(f"not quiet after {timeout_s:g} s: {sorted(open_jobs)[:3]}")

    @contextmanager
    def pace(self, seconds: float) -> Iterator[None]:
        """Steps take at least so long, so that a fault hits the middle of a job."""
        self.service.order({"do": "pace", "s": seconds})
        try:
            yield
        finally:
            self.service.order()

    @property
    def worst_leases(self) -> float | None:
        """The worst recovery as a multiple of the lease."""
        return max(self.recoveries_s) / LEASE_S if self.recoveries_s else None


ALL: dict[str, Fault] = {}


def fault(
    id: str, title: str, *, bar: str, n: int = 3, n_all: int = 10
) -> Callable[[Callable[[Run], None]], Callable[[Run], None]]:
    """Enter a function into the matrix."""

    def enter(inject: Callable[[Run], None]) -> Callable[[Run], None]:
        ALL[id] = Fault(id, title, bar, n, n_all, inject)
        return inject

    return enter

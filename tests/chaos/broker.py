"""Faults of the broker. It may be wiped at any time: rows are the truth, messages are hints."""

from __future__ import annotations

import time

from tests.chaos import truth
from tests.chaos.faults import Run, fault
from tests.chaos.proxy import Proxy
from tests.chaos.service import TRAINING

START_S = 15.0  # how soon a job starts once the broker is back


def wait_started(run: Run, jobs: list[str], *, since: float, within_s: float = START_S) -> None:
    """Every job has begun by then; the slowest is noted as a recovery."""
    deadline = time.monotonic() + within_s + 30
    waiting = set(jobs)
    while waiting and time.monotonic() < deadline:
        for job in sorted(waiting):
            begun = truth.claims(run.service, job)
            if begun:
                waiting.discard(job)
                run.recoveries_s.append(min(begun.values()).timestamp() - since)
        time.sleep(0.1)
    run.check(not waiting, f"{len(waiting)} jobs did not start")


@fault("F15", "the broker is killed and comes back empty", bar="queued jobs start <= 15 s after it is back")
def restart_empty(run: Run) -> None:
    with run.pace(0.1):
        for _ in run.rounds():
            jobs = run.start_jobs(6)
            run.service.valkey.crash()
            time.sleep(run.chance.uniform(0.5, 3.0))
            run.service.start_servers()
            begun = time.time()
            run.finish(jobs)
            late = [at for job in jobs if (at := min_claim(run, job)) is None or at - begun > START_S]
            run.check(not late, f"{len(late)} jobs started later than {START_S:g} s")


@fault("F16", "FLUSHALL with one running and 50 queued", bar="none lost, none doubled", n=1, n_all=2)
def flush(run: Run) -> None:
    for _ in run.rounds():
        with run.pace(0.1):
            running = run.start_job(steps=15)
            run.wait_step(running, after=1)
            jobs = run.start_jobs(50, steps=3)
            run.service.redis.flushall()
        run.finish([running, *jobs])


@fault("F18", "CLIENT KILL of all connections every 2 s", bar="one attempt a job", n=1, n_all=1)
def kill_connections(run: Run) -> None:
    with run.pace(0.1):
        jobs = run.start_jobs(10, steps=9)
        until = time.monotonic() + (60 if run.n > 1 else 20)
        while time.monotonic() < until:
            run.runs += 1
            run.service.redis.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            time.sleep(2)
            jobs += run.start_jobs(1, steps=3)
        run.finish(jobs)
    twice = truth.rows(
        run.service.engine, "SELECT id FROM jobs WHERE id = ANY(:ids) AND attempt <> 1", ids=jobs
    )
    run.check(not twice, f"{len(twice)} jobs had more than one attempt")


@fault("F20", "one reply swallowed, and with it a hint", bar="the job starts <= 15 s")
def swallow(run: Run) -> None:
    for _ in run.rounds():
        lines = [run.service.broker[name] for name in TRAINING]
        for line in lines:
            line.swallow_reply(b"luthier.run_job")
        begun = time.time()
        job = run.start_job(steps=3)
        fired = wait_fired(lines)
        wait_started(run, [job], since=begun)
        run.check(fired, "no reply was swallowed")
        run.finish([job])
    run.check(max(run.recoveries_s, default=0.0) <= START_S, "a job started later than 15 s")


def wait_fired(lines: list[Proxy], *, timeout_s: float = 10.0) -> bool:
    """Until one of these armed lines has done its one thing; the others forget theirs."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and not any(line.fired.is_set() for line in lines):
        time.sleep(0.01)
    for line in lines:
        line.disarm()
    return any(line.fired.is_set() for line in lines)


def min_claim(run: Run, job: str) -> float | None:
    """When the first attempt of a job began."""
    begun = truth.claims(run.service, job)
    return min(begun.values()).timestamp() if begun else None

"""Faults of processes: killed, frozen, stopped. The bar of each stands in its entry."""

from __future__ import annotations

import signal
import time

import psutil

from tests.chaos import truth
from tests.chaos.faults import Run, fault
from tests.chaos.service import LEASE_S, TRAINING


def hit_running(run: Run, *, steps: int = 15) -> tuple[str, int]:
    """A job that is in the middle of its steps, and its attempt."""
    job = run.start_job(steps=steps)
    step = run.wait_step(job, after=run.chance.randrange(2, steps - 4))
    return job, step.attempt


@fault(
    "F02", "kill -9 the supervising worker", bar="trainer dead <= 2 s; next attempt <= 1.5 leases", n_all=20
)
def kill_supervisor(run: Run) -> None:
    with run.pace(0.1):
        for _ in run.rounds():
            job, attempt = hit_running(run)
            worker = run.worker_of(job)
            trainer = worker.trainer()
            at = worker.kill()
            gone = trainer is None or not psutil.wait_procs([trainer], timeout=2.0)[1]
            run.check(gone, "the trainer outlived its worker by 2 s")
            run.wait_attempt(job, beyond=attempt, since=at)
            worker.start()
            run.finish([job])
            run.service.wait_ready()
    run.check((run.worst_leases or 9) <= 1.5, "the next attempt came later than 1.5 leases")


@fault("F03", "kill -9 the whole worker tree", bar="next attempt <= 1.5 leases", n_all=20)
def kill_tree(run: Run) -> None:
    with run.pace(0.1):
        for _ in run.rounds():
            job, attempt = hit_running(run)
            worker = run.worker_of(job)
            at = worker.kill_tree()
            run.wait_attempt(job, beyond=attempt, since=at)
            worker.start()
            run.finish([job])
            run.service.wait_ready()
    run.check((run.worst_leases or 9) <= 1.5, "the next attempt came later than 1.5 leases")


@fault(
    "F05",
    "freeze a worker tree for 3 leases, thaw it",
    bar="a successor ran; every write of the thawed one refused; never two holders",
)
def freeze(run: Run) -> None:
    with run.pace(0.2):
        for _ in run.rounds():
            job, attempt = hit_running(run, steps=60)
            worker = run.worker_of(job)
            at = time.time()
            worker.freeze()
            run.wait_attempt(job, beyond=attempt, since=at)
            time.sleep(max(0.0, at + 3 * LEASE_S - time.time()))
            worker.thaw()
            thawed_at = time.monotonic()
            time.sleep(2.0)
            late = [
                step
                for step in truth.steps(run.service, job)
                if step.attempt <= attempt and step.at > thawed_at + 1.0
            ]
            run.check(not late, f"the thawed attempt trained {len(late)} steps, a second after it woke")
            run.finish([job])


@fault("F12", "SIGTERM to one worker after another while jobs run", bar="0 lost, 0 doubled, no try lost")
def rolling_deploy(run: Run) -> None:
    with run.pace(0.05):
        for _ in run.rounds():
            jobs = run.start_jobs(20, steps=6)
            for name in (*TRAINING, "control", "api", "inference"):
                part = run.service.parts[name]
                part.kill(signal.SIGTERM)
                part.wait(timeout_s=30)
                part.start()
                time.sleep(run.chance.uniform(0.5, 2.0))
            run.finish(jobs)
            run.service.wait_ready()
    deaths = truth.rows(
        run.service.engine, "SELECT id FROM jobs WHERE id = ANY(:ids) AND deaths > 0", ids=list(run.jobs)
    )
    run.check(not deaths, f"{len(deaths)} jobs lost a try to a deploy")

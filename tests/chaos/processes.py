"""Faults of whole processes: killed, frozen, stopped, replaced. The bar of each stands in its entry."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

from app.cli.process_commands import SOURCE_ROOT
from app.core.migrate import downgrade, upgrade
from tests.chaos import truth
from tests.chaos.faults import Run, fault
from tests.chaos.service import HOOKS, LEASE_S, START_S, TRAINING


def hit_running(run: Run, *, steps: int = 15) -> tuple[str, int]:
    """A job that is in the middle of its steps, and its attempt."""
    job = run.start_job(steps=steps)
    step = run.wait_step(job, after=run.chance.randrange(2, steps - 4))
    return job, step.attempt


@fault(
    "F02", "kill -9 the supervising worker", bar="trainer dead <= 2 s; next attempt <= 1.5 leases", n_all=12
)
def kill_supervisor(run: Run) -> None:
    with run.pace(0.1):
        for _ in run.rounds():
            job, attempt = hit_running(run)
            worker = run.worker_of(job)
            trainer = worker.trainer()
            at = worker.kill()
            run.check(
                trainer is None or is_gone(trainer, within_s=2.0), "the trainer outlived its worker by 2 s"
            )
            run.wait_attempt(job, beyond=attempt, since=at)
            run.finish([job])
            run.service.wait_ready()
    run.check((run.worst_leases or 9) <= 1.5, "the next attempt came later than 1.5 leases")


def is_gone(process: psutil.Process, *, within_s: float) -> bool:
    """Whether it ends in time. A zombie has ended: who adopted it may take its time to notice."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        with suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.02)
                continue
        return True
    return False


@fault("F03", "kill -9 the whole worker tree", bar="next attempt <= 1.5 leases", n_all=12)
def kill_tree(run: Run) -> None:
    with run.pace(0.1):
        for _ in run.rounds():
            job, attempt = hit_running(run)
            at = run.worker_of(job).kill_tree()
            run.wait_attempt(job, beyond=attempt, since=at)
            run.finish([job])
            run.service.wait_ready()
    run.check((run.worst_leases or 9) <= 1.5, "the next attempt came later than 1.5 leases")


@fault(
    "F05",
    "freeze a worker tree for 3 leases, thaw it",
    bar="a successor ran; every write of the thawed one refused; never two holders",
    n=2,
    n_all=6,
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


@fault(
    "F07",
    "a poison job kills its worker at its first step",
    bar="failed after 3 tries; 10 others unaffected",
    n=1,
    n_all=3,
)
def poison(run: Run) -> None:
    for _ in run.rounds():
        run.service.order({"do": "kill_worker", "seed": 666})
        bad = run.tenant.create(steps=6, seed=666)
        run.jobs.add(bad)
        run.may_fail.add(bad)
        others = run.start_jobs(10, steps=3)
        run.finish([bad, *others])
        run.service.order()
        job = run.tenant.get(bad)
        run.check(job.status == "failed", f"the poison job is {job.status}")
        run.check(job.error.code == "worker_lost", f"its error: {job.error}")
        [row] = truth.rows(run.service.engine, "SELECT attempt FROM jobs WHERE id = :job", job=bad)
        run.check(row.attempt == 3, f"it was tried {row.attempt} times")
        twice = truth.rows(
            run.service.engine, "SELECT id FROM jobs WHERE id = ANY(:ids) AND attempt > 1", ids=others
        )
        run.check(not twice, f"{len(twice)} other jobs lost a try")
        run.service.wait_ready()


@fault(
    "F12",
    "SIGTERM to every process in turn while 20 jobs run",
    bar="0 lost, no try lost, <= 1.5x the time",
    n=1,
    n_all=1,
)
def rolling_deploy(run: Run) -> None:
    """Every 20 s one training worker and one other process are asked to stop, and replaced."""
    count, steps, every_s = (20, 45, 20.0) if run.whole else (8, 30, 20.0)
    names = ((TRAINING[0], "control"), (TRAINING[1], "api"), (TRAINING[0], "inference"))
    with run.pace(0.15):
        begun = time.monotonic()
        run.finish(run.start_jobs(count, steps=steps))
        calm_s = time.monotonic() - begun
        begun = time.monotonic()
        jobs = run.start_jobs(count, steps=steps)
        while not run_is_quiet(run, jobs) and time.monotonic() - begun < 5 * calm_s:
            next_at = time.monotonic() + every_s
            parts = [run.service.parts[name] for name in names[run.runs % len(names)]]
            for part in parts:
                part.kill(signal.SIGTERM)
            for part in parts:
                part.wait(timeout_s=30)
                part.start()
            run.runs += 1
            while time.monotonic() < next_at and not run_is_quiet(run, jobs):
                run.mend(0.2)
        run.finish(jobs)
        deploy_s = time.monotonic() - begun
    run.notes.append(f"{calm_s:.0f} s undisturbed, {deploy_s:.0f} s under {run.runs} stops")
    run.check(deploy_s <= 1.5 * calm_s or not run.whole, "the deploys cost more than half of the time again")
    deaths = truth.rows(
        run.service.engine, "SELECT id FROM jobs WHERE id = ANY(:ids) AND deaths > 0", ids=list(run.jobs)
    )
    run.check(not deaths, f"{len(deaths)} jobs lost a try to a deploy")


def run_is_quiet(run: Run, jobs: list[str]) -> bool:
    """Whether all of these are final."""
    return not truth.rows(
        run.service.engine,
        "SELECT 1 FROM jobs WHERE id = ANY(:ids) AND finished_at IS NULL LIMIT 1",
        ids=jobs,
    )


@fault(
    "F13",
    "an old worker on the new schema, and the schema one step back",
    bar="both jobs finish",
    n=1,
    n_all=1,
)
def old_worker(run: Run) -> None:
    """Training workers of before the newest migration; the schema goes down and up in the middle of a job."""
    old = checkout_before_migration()
    if old is None:
        run.skipped = "no git history with an older migration"
        return
    service = run.service
    try:
        for name in TRAINING:
            service.parts[name].stop()
            service.parts[name].extra_env = {
                "PYTHONPATH": os.pathsep.join([str(HOOKS), str(old)]),
                "LUTHIER_TRAINER_GRACE_S": "1",  # older code has it inside the lease
            }
            service.parts[name].start()
        deadline = time.monotonic() + START_S
        while service.absent_trainers() and time.monotonic() < deadline:
            time.sleep(0.2)  # not by /readyz: an old worker may lack what a new API asks for
        with run.pace(0.1):
            run.finish([run.start_job(steps=9)])
            job = run.start_job(steps=90)
            run.wait_step(job, after=5)
            for name in ("api", "control", "inference"):
                service.parts[name].stop()
            downgrade(service.postgres.url, revision="-1")
            seen = len(truth.steps(service, job))
            run.wait_step(job, after=seen + 10)
            upgrade(service.postgres.url)
            for part in service.parts.values():
                part.start()
        run.finish([job])
        run.runs += 1
    finally:
        shutil.rmtree(old, ignore_errors=True)


def checkout_before_migration() -> Path | None:
    """The code as it was before its newest migration came."""
    versions = "migrations/versions"
    log = ["git", "-C", str(SOURCE_ROOT), "log", "--diff-filter=A", "--format=%H", "-1", "--", versions]
    done = subprocess.run(log, capture_output=True, text=True, check=False)
    newest = done.stdout.strip()
    if not newest:
        return None
    folder = Path(tempfile.mkdtemp(prefix="chaos-old-"))
    archive = subprocess.run(
        ["git", "-C", str(SOURCE_ROOT), "archive", f"{newest}^"], capture_output=True, check=False
    )
    if archive.returncode != 0:
        return None
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    folder.chmod(0o755)
    return folder if (folder / versions).is_dir() else None


@fault(
    "F14", "SIGKILL of everything at once, servers too", bar="fsck finds nothing; all jobs end", n=2, n_all=6
)
def kill_everything(run: Run) -> None:
    with run.pace(0.05):
        for _ in run.rounds():
            jobs = run.start_jobs(5, steps=9)
            time.sleep(run.chance.uniform(0.0, 3.0))
            for part in run.service.parts.values():
                part.kill_tree()
            run.service.postgres.crash()
            run.service.valkey.crash()
            at = time.time()
            run.service.start_servers()
            run.mend(0.1)
            run.finish(jobs)
            run.service.wait_ready()
            run.recoveries_s.append(time.time() - at)

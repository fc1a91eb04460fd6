"""Faults of the database: gone, restarted, cut off at the worst moment, locked, and clocks that lie."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import openai
from sqlalchemy import text

from tests.chaos import truth
from tests.chaos.faults import Run, fault
from tests.chaos.proxy import Mode, Proxy
from tests.chaos.service import LEASE_S, TRAINING

FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")


@fault(
    "F26",
    "PostgreSQL is restarted at once five times under load",
    bar="no accepted id lost; no 500",
    n=1,
    n_all=4,
)
def restart_database(run: Run) -> None:
    for _ in run.rounds():
        with run.pace(0.05), load(run) as made:
            for _ in range(5):
                time.sleep(run.chance.uniform(0.3, 1.5))
                run.service.postgres.crash(signal.SIGQUIT)  # PostgreSQL's immediate stop
                run.service.start_servers()
        run.check(len(made) > 5, f"only {len(made)} jobs were made under load")
        run.finish()


class load:  # noqa: N801 - reads as a verb
    """Both projects create short jobs and read them, until the block ends."""

    def __init__(self, run: Run, *, steps: int = 3, pause_s: float = 0.2, most: int = 40) -> None:
        self._run = run
        self._steps, self._pause_s, self._most = steps, pause_s, most
        self._over = threading.Event()
        self.made: list[str] = []
        self._threads = [
            threading.Thread(target=self._work, args=(tenant,), daemon=True) for tenant in run.tenants
        ]

    def __enter__(self) -> list[str]:
        for thread in self._threads:
            thread.start()
        return self.made

    def _work(self, tenant: object) -> None:
        while not self._over.is_set() and len(self.made) < self._most:
            try:
                job = tenant.create(steps=self._steps)  # type: ignore[attr-defined]
                self.made.append(job)
                self._run.jobs.add(job)
                tenant.get(job)  # type: ignore[attr-defined]
            except Exception as error:
                self._run.failures.append(f"under load: {type(error).__name__}: {error}")
            self._over.wait(self._pause_s)

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(timeout=120)


@fault(
    "F27",
    "the database is away for a quarter of a lease, then for four",
    bar="short: the attempt goes on; long: it fences itself and resumes; chat answers or says 503",
    n=1,
    n_all=4,
)
def database_away(run: Run) -> None:
    lines = list(run.service.database.values())
    for _ in run.rounds():
        with run.pace(0.2):
            job = run.start_job(steps=45, checkpoint_interval=5)
            run.wait_step(job, after=6)
            for mode, away_s in ((Mode.REFUSE, LEASE_S / 4), (Mode.BLACKHOLE, LEASE_S * 4)):
                before = attempt_of(run, job)
                for line in lines:
                    line.break_off(mode)
                began = time.monotonic()
                chat_answers = ask_chat(run, until=began + away_s)
                trained = [step for step in truth.steps(run.service, job) if step.at > began + LEASE_S]
                for line in lines:
                    line.heal()
                begun = time.time()
                odd = {answer for answer in chat_answers if answer not in ("200", "503")}
                run.check(not odd, f"chat without the database: {sorted(odd)}")
                if away_s < LEASE_S:
                    time.sleep(1.0)
                    after = attempt_of(run, job)
                    run.check(after == before, "a quarter of a lease without the database ended the attempt")
                else:
                    run.check(not trained, f"{len(trained)} steps were trained after the lease had run out")
                    run.wait_attempt(job, beyond=before, since=begun)
        run.finish([job])


def attempt_of(run: Run, job: str) -> int:
    """Which attempt holds the job, or held it last."""
    return int(truth.rows(run.service.engine, "SELECT attempt FROM jobs WHERE id = :job", job=job)[0].attempt)


def ask_chat(run: Run, *, until: float) -> list[str]:
    """Ask again and again; how each was answered."""
    answers = []
    while time.monotonic() < until:
        try:
            run.tenant.chat("tiny", timeout_s=15)
            answers.append("200")
        except openai.APIStatusError as error:
            bare = error.status_code == 503 and "retry-after" not in error.response.headers
            answers.append("503 without retry-after" if bare else str(error.status_code))
        except openai.APIConnectionError as error:
            answers.append(type(error).__name__)
        time.sleep(0.3)
    return answers


@fault(
    "F28",
    "the line is cut after a COMMIT was sent: creating, claiming, finishing",
    bar="the same key gives the same job; no double claim; one end",
    n=2,
    n_all=10,
)
def cut_commit(run: Run) -> None:
    training = [run.service.database[name] for name in TRAINING]
    for number in run.rounds():
        line = run.service.database["api"]
        line.cut_after_commit(b"INSERT INTO jobs")
        key = f"cut-{run.chance.random()}-{number}"
        before = count_jobs(run)
        job = run.tenant.create(steps=3, key=key)
        run.jobs.add(job)
        run.check(line.fired.is_set(), "no COMMIT of a creation was cut")
        run.check(count_jobs(run) == before + 1, f"one creation made {count_jobs(run) - before} jobs")
        run.finish([job])
        for statement in (b"Fine-tuning job started", b"successfully completed"):
            for line in training:
                line.cut_after_commit(statement)
            job = run.start_job(steps=3)
            run.check(wait_cut(training), f"no COMMIT of {statement.decode()} was cut")
            run.finish([job])
            [row] = truth.rows(
                run.service.engine, "SELECT attempt, deaths, status FROM jobs WHERE id = :job", job=job
            )
            run.check(row.status == "succeeded", f"{job} is {row.status} after {statement.decode()}")
            most = 1 if b"completed" in statement else 2  # a claim whose answer is lost waits for its lease
            run.check(row.attempt <= most, f"{job} had {row.attempt} attempts after {statement.decode()}")


def wait_cut(lines: list[Proxy], *, timeout_s: float = 20.0) -> bool:
    """Until one of the lines has cut; the others forget it."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and not any(line.fired.is_set() for line in lines):
        time.sleep(0.01)
    for line in lines:
        line.disarm()
    return any(line.fired.is_set() for line in lines)


def count_jobs(run: Run) -> int:
    """All jobs there are."""
    return int(truth.rows(run.service.engine, "SELECT count(*) AS n FROM jobs")[0].n)


@fault(
    "F30",
    "rows of jobs and files are locked by somebody for 12 s",
    bar="reads stay <= 2 s; writes end by the lock limit with 503, or succeed; no update lost",
    n=1,
    n_all=2,
)
def hold_locks(run: Run) -> None:
    for _ in run.rounds():
        with run.pace(0.2):
            job = run.start_job(steps=60, checkpoint_interval=5)
            run.wait_step(job, after=6)
            reads: list[float] = []
            writes: list[str] = []
            writers = [
                threading.Thread(target=try_write, args=(run, job, writes), daemon=True) for _ in range(2)
            ]
            with run.service.engine.begin() as holder:
                holder.execute(text("SELECT * FROM jobs WHERE id = :job FOR UPDATE"), {"job": job})
                holder.execute(text("SELECT * FROM files FOR UPDATE"))
                for writer in writers:
                    writer.start()
                until = time.monotonic() + 12
                while time.monotonic() < until:
                    begun = time.monotonic()
                    run.tenant.get(job)
                    reads.append(time.monotonic() - begun)
                    time.sleep(0.1)
            for writer in writers:
                writer.join(timeout=60)
        run.notes.append(f"slowest read {max(reads) * 1000:.0f} ms, writes {sorted(writes)}")
        run.check(max(reads) <= 2.0, f"a read took {max(reads):.1f} s")
        run.check(set(writes) <= {"200", "503"}, f"writes were answered {writes}")
        run.finish()


def try_write(run: Run, job: str, answers: list[str]) -> None:
    """One creation and one change of the locked job, each asked once."""
    client = run.tenant.client.with_options(timeout=30)
    [row] = truth.rows(run.service.engine, "SELECT training_file FROM jobs WHERE id = :job", job=job)
    try:
        made = client.fine_tuning.jobs.create(
            model="tiny", training_file=row.training_file, hyperparameters={"n_epochs": 1, "batch_size": 4}
        )
        run.jobs.add(made.id)
        answers.append("200")
    except openai.APIStatusError as error:
        answers.append(str(error.status_code))


@fault(
    "F31",
    "clocks of two workers lie by two hours, and one jumps back in the middle of a job",
    bar="no early takeover; events in order",
    n=1,
    n_all=2,
)
def lying_clocks(run: Run) -> None:
    if not FAKETIME.exists():
        run.skipped = "libfaketime is not installed"
        return
    for _ in run.rounds():
        for name, offset in (("training-a", "+2h"), ("training-b", "-2h"), ("control", "+2h")):
            file = run.service.chaos / f"clock-{name}"
            file.write_text(f"{offset}\n")
            part = run.service.parts[name]
            part.stop()
            part.extra_env = {
                "LD_PRELOAD": str(FAKETIME),
                "FAKETIME_TIMESTAMP_FILE": str(file),
                "FAKETIME_NO_CACHE": "1",
                "DONT_FAKE_MONOTONIC": "1",
            }
            part.start()
        run.service.wait_ready()
        with run.pace(0.2):
            jobs = run.start_jobs(4, steps=30)
            run.wait_step(jobs[0], after=5)
            for name in TRAINING:
                (run.service.chaos / f"clock-{name}").write_text("-3h\n")
            run.finish(jobs)
        taken = truth.rows(
            run.service.engine, "SELECT id FROM jobs WHERE id = ANY(:ids) AND attempt > 1", ids=jobs
        )
        run.check(not taken, f"{len(taken)} jobs were taken from a living worker")
        with suppress(OSError):
            for name in ("training-a", "training-b", "control"):
                (run.service.chaos / f"clock-{name}").unlink()
        run.service.heal()
        run.service.wait_ready()

"""Faults of the process that trains: killed at a step, ended oddly, hung, too large, with stray children."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import psutil

from tests.chaos import truth
from tests.chaos.faults import Run, fault
from tests.chaos.service import SETTINGS

INTERVAL = 4  # steps between checkpoints
STEPS = 18


@fault(
    "F01",
    "kill -9 the trainer at a random step",
    bar="the adapter equals the uninterrupted run's, bit for bit; at most one interval lost",
    n=6,
    n_all=20,
)
def kill_trainer(run: Run) -> None:
    whole = run.start_job(steps=STEPS, checkpoint_interval=INTERVAL)
    run.finish([whole])
    wanted = truth.adapter_digest(run.service, whole)
    equal = 0
    for _ in run.rounds():
        step = run.chance.randint(1, STEPS)
        run.service.order({"do": "signal", "number": int(signal.SIGKILL), "attempt": 1, "step": step})
        job = run.start_job(steps=STEPS, checkpoint_interval=INTERVAL)
        run.finish([job])
        run.service.order()
        seen = truth.steps(run.service, job)
        run.check(seen[-1].attempt > 1, f"{job} was not killed at step {step}")
        first, second = (sum(one.attempt == attempt for one in seen) for attempt in (1, 2))
        if seen[-1].attempt == 2:  # a third would have lost steps of its own
            lost = first - 1 - (STEPS - second)  # it died before the last of its steps was done
            run.check(lost <= INTERVAL, f"{job}: {lost} steps lost by a kill in step {step}")
        same = truth.adapter_digest(run.service, job) == wanted
        equal += same
        run.check(same, f"{job}: killed in step {step}, its adapter differs")
    run.notes.append(f"{equal} of {run.runs} adapters bit-equal")


@fault(
    "F06",
    "the trainer exits 0 or 1 without a result, segfaults, aborts",
    bar="each is told apart and tried again; each time again fails the job with its cause",
    n=1,
    n_all=2,
)
def odd_ends(run: Run) -> None:
    ends: dict[str, dict[str, object]] = {
        "exit code 0": {"do": "exit", "code": 0},
        "exit code 1": {"do": "exit", "code": 1},
        "SIGSEGV": {"do": "signal", "number": int(signal.SIGSEGV)},
        "SIGABRT": {"do": "signal", "number": int(signal.SIGABRT)},
    }
    for _ in run.rounds():
        for words, order in ends.items():
            run.service.order({**order, "attempt": 1, "step": 2})
            once = run.start_job(steps=6)
            run.finish([once])
            told = " ".join(event.message for event in messages(run, once))
            run.check(words in told, f"{once}: nothing tells {words}")
        run.service.order({**ends[run.chance.choice(list(ends))], "step": 2})
        always = run.start_job(steps=6)
        run.may_fail.add(always)
        run.finish([always])
        run.service.order()
        job = run.tenant.get(always)
        run.check(job.status == "failed", f"{always} is {job.status}")
        run.check(bool(job.error) and job.error.code == "trainer_died", f"{always}: {job.error}")


@fault(
    "F08",
    "the kernel ends a trainer that takes too much memory",
    bar="named as memory; at most one more try",
    n=1,
    n_all=2,
)
def hog_memory(run: Run) -> None:
    groups = Path("/sys/fs/cgroup/memory")
    for _ in run.rounds():
        run.service.order({"do": "hog", "step": 2})
        with limited_memory(run, groups) as limited:
            if not limited:
                run.skipped = "no memory cgroup of version 1 can be written here"
                return
            job = run.start_job(steps=6)
            run.may_fail.add(job)
            run.finish([job])
        run.service.order()
        told = run.tenant.get(job)
        run.check(told.status == "failed", f"{job} is {told.status}")
        code = told.error.code if told.error else None
        run.check(code == "host_out_of_memory", f"{job}: {told.error}")
        [row] = truth.rows(run.service.engine, "SELECT attempt FROM jobs WHERE id = :job", job=job)
        run.check(row.attempt <= 2, f"{job} was tried {row.attempt} times")
        run.check(run.tenant.chat("tiny") is not None, "chat does not answer")


class limited_memory:  # noqa: N801 - reads as a verb
    """Every trainer with little memory: the group that the product made for it is narrowed."""

    def __init__(self, run: Run, root: Path) -> None:
        self._run = run
        self._root = root
        self._narrowed: list[tuple[Path, str]] = []

    def __enter__(self) -> bool:
        for trainer in self._run.service.trainers():
            try:
                inside = next(
                    line.split(":", 2)[2]
                    for line in Path(f"/proc/{trainer.pid}/cgroup").read_text().splitlines()
                    if "memory" in line.split(":")[1]
                )
                limit = self._root / inside.lstrip("/") / "memory.limit_in_bytes"
                used = int((limit.parent / "memory.usage_in_bytes").read_text())
                if inside == "/":
                    return False
                self._narrowed.append((limit, limit.read_text()))
                limit.write_text(str(used + 200 * 2**20))
            except (OSError, StopIteration):
                return False
        return bool(self._narrowed)

    def __exit__(self, *_: object) -> None:
        for limit, before in self._narrowed:
            if limit.exists():
                limit.write_text(before)


@fault(
    "F10",
    "a step that never returns, with and without the interpreter's lock",
    bar="killed within its section's limit + 10 s; the reason names the section",
    n=1,
    n_all=3,
)
def hang(run: Run) -> None:
    limit_s = float(SETTINGS["step_limit_s"])
    for _ in run.rounds():
        for how in ("hang", "hang_holding_the_interpreter"):
            run.service.order({"do": how, "attempt": 1, "step": 3})
            job = run.start_job(steps=6)
            run.wait_step(job, after=2)
            stuck = time.time()
            run.wait_attempt(job, beyond=1, since=stuck)
            run.finish([job])
            run.service.order()
            took_s = run.recoveries_s.pop()
            run.notes.append(f"{how}: next attempt after {took_s:.1f} s, limit {limit_s:g} s")
            run.check(took_s <= limit_s + 10, f"{job} went on after {took_s:.1f} s")
            told = " ".join(event.message for event in messages(run, job))
            run.check("section step" in told, f"{job}: no event names the section: {told[-400:]}")


@fault(
    "F11",
    "a job leaves double-forked children, in its session and out",
    bar="none alive 5 s after the end",
    n=1,
    n_all=4,
)
def stray_children(run: Run) -> None:
    for _ in run.rounds():
        run.service.order({"do": "leave_children", "count": 10, "step": 2})
        job = run.start_job(steps=6)
        run.wait_step(job, after=3)
        run.check(len(strays()) > 0, "no children were left; the fault did not happen")
        run.finish([job])
        run.service.order()
        deadline = time.monotonic() + 5
        while strays() and time.monotonic() < deadline:
            time.sleep(0.1)
        left = strays()
        run.check(not left, f"{len(left)} children of a job live 5 s after its end")
        for process in left:
            process.kill()
        stray_after_kill(run)


def stray_after_kill(run: Run) -> None:
    """The same when the worker is killed in the middle of the job."""
    run.service.order({"do": "leave_children", "count": 10, "step": 2}, {"do": "pace", "s": 0.2})
    job = run.start_job(steps=15)
    run.wait_step(job, after=3)
    run.worker_of(job).kill()
    run.service.order()
    deadline = time.monotonic() + 5
    while strays() and time.monotonic() < deadline:
        time.sleep(0.1)
    run.check(not strays(), f"{len(strays())} children live 5 s after their worker was killed")
    for process in strays():
        process.kill()
    run.finish([job])
    run.service.wait_ready()


def strays() -> list[psutil.Process]:
    """What hooks/sitecustomize.py leaves behind."""
    return [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "86.4"]]


def messages(run: Run, job: str) -> list[object]:
    """The events of a job that are words."""
    statement = "SELECT message, level, attempt FROM job_events WHERE job_id = :job AND type = 'message'"
    return truth.rows(run.service.engine, statement + " ORDER BY sequence", job=job)

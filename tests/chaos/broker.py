"""Faults of the broker. It may be wiped at any time: rows are the truth, messages are hints."""

from __future__ import annotations

import base64
import json
import os
import pickle
import time
import uuid
from pathlib import Path

from app.core.queue import Queue, Sender, Task, make_celery
from app.core.settings import Settings
from tests.chaos import truth
from tests.chaos.faults import Run, fault
from tests.chaos.proxy import Mode, Proxy
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


@fault(
    "F15",
    "the broker is killed and comes back empty",
    bar="queued jobs start <= 15 s after it is back",
    n_all=5,
)
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
        until = time.monotonic() + (60 if run.whole else 20)
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


@fault("F20", "one reply swallowed, and with it a hint", bar="the job starts <= 15 s", n_all=5)
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


@fault(
    "F17", "the broker is down while jobs are created", bar="all accepted; p99 <= 2x or 50 ms", n=1, n_all=1
)
def create_without_broker(run: Run) -> None:
    count = 50
    normal = [timed_create(run) for _ in range(count)]
    run.finish()
    run.service.valkey.crash()
    down_at = time.monotonic()
    down = [timed_create(run) for _ in range(count)]
    time.sleep(max(0.0, down_at + (60 if run.whole else 5) - time.monotonic()))
    run.service.start_servers()
    begun = time.time()
    run.runs += 1
    run.finish()
    late = [at for job in run.jobs if (at := min_claim(run, job)) is None or at > begun + 60]
    run.check(not late, f"{len(late)} jobs started a minute after the broker was back, or never")
    slow, usual = max(down), max(normal)
    run.notes.append(f"slowest of {count}: {usual * 1000:.0f} ms, broker down {slow * 1000:.0f} ms")
    run.check(slow <= max(2 * usual, 0.05), "creating a job is slower without the broker")
    run.check(not run.tenant.answers, f"not every request was accepted: {dict(run.tenant.answers)}")


def timed_create(run: Run) -> float:
    """How long the creation of a short job took, in seconds."""
    begun = time.monotonic()
    run.start_job(steps=3)
    return time.monotonic() - begun


@fault(
    "F19",
    "lines to the broker half open, healed",
    bar="jobs start <= 15 s after the line is back",
    n=1,
    n_all=1,
)
def half_open(run: Run) -> None:
    lines = [run.service.broker[name] for name in ("control", "inference", *TRAINING)]
    for line in lines:
        line.break_off(Mode.BLACKHOLE)
    job = run.start_job(steps=3)
    time.sleep(170 if run.whole else 25)
    for line in lines:
        line.heal_silently()
    begun = time.time()
    jobs = [job, run.start_job(steps=3)]
    run.runs += 1
    wait_started(run, jobs, since=begun)
    run.check(max(run.recoveries_s, default=99.0) <= START_S, "a job started later than 15 s")
    run.finish(jobs)


@fault("F21", "one hint sent 200 times", bar="one attempt", n=2, n_all=4)
def repeat_hint(run: Run) -> None:
    sender = hint_sender(run)
    for _ in run.rounds():
        job = run.start_job(steps=6)
        for _ in range(200):
            sender.send(Task.RUN_JOB, str(Queue.TRAINING), job)
        run.finish([job])
        for _ in range(20):
            sender.send(Task.RUN_JOB, str(Queue.TRAINING), job)
        time.sleep(1)
        [row] = truth.rows(run.service.engine, "SELECT attempt FROM jobs WHERE id = :job", job=job)
        run.check(row.attempt == 1, f"{job} had {row.attempt} attempts")


@fault(
    "F22",
    "garbage, unknown ids, pickles and 50 MB in the queues",
    bar="dropped; workers live; nothing runs",
    n=1,
    n_all=3,
)
def garbage(run: Run) -> None:
    sender, marker = hint_sender(run), run.service.chaos / "executed"
    mine, theirs = run.start_job(steps=3), run.tenants[1].create(steps=3)
    run.jobs.add(theirs)
    queues = ("control", "training", "inference.tiny")
    pids = {name: part.pid for name, part in run.service.parts.items()}
    for _ in run.rounds():
        for queue in queues:
            for text in (b"junk", b"{}", b"[1, 2]", b'{"body": 1}', b"\xff\xfe", b"x" * 50_000_000):
                run.service.redis.lpush(queue, text)
            run.service.redis.lpush(queue, pickled(queue, marker))
            for arguments in (("ftjob-unknown",), (theirs,), (None,), ({"a": 1},), (), (mine, 2, 3)):
                for task in (Task.RUN_JOB, Task.VALIDATE_JOB, Task.COMPLETE):
                    sender.send(task, queue, *arguments)
        begun = time.time()
        job = run.start_job(steps=3)
        wait_started(run, [job], since=begun)
        run.finish()
    gone = [name for name, part in run.service.parts.items() if not part.is_alive or part.pid != pids[name]]
    run.check(not gone, f"{', '.join(gone)} died of garbage")
    run.check(not marker.exists(), "a pickle was executed")
    deadline = time.monotonic() + 15
    while any(waiting := [run.service.redis.llen(queue) for queue in queues]) and time.monotonic() < deadline:
        time.sleep(0.1)
    run.check(not any(waiting), f"garbage is still queued: {waiting}")


def pickled(queue: str, marker: Path) -> bytes:
    """A message as kombu frames it, with a pickle inside that would make a file."""

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {marker}",)

    body = base64.b64encode(pickle.dumps((["ftjob-x"], {}, Bomb()))).decode()
    message = {
        "body": body,
        "content-encoding": "binary",
        "content-type": "application/x-python-serialize",
        "headers": {"task": str(Task.RUN_JOB), "id": uuid.uuid4().hex, "lang": "py"},
        "properties": {
            "delivery_info": {"exchange": "", "routing_key": queue},
            "delivery_tag": uuid.uuid4().hex,
            "body_encoding": "base64",
        },
    }
    return json.dumps(message).encode()


@fault(
    "F23", "the broker is full, then read-only", bar="jobs are accepted and start <= 15 s after", n=1, n_all=3
)
def refusing_broker(run: Run) -> None:
    redis = run.service.redis
    for _ in run.rounds():
        redis.config_set("maxmemory", 1)
        jobs = run.start_jobs(5, steps=3)
        time.sleep(2)
        redis.config_set("maxmemory", 0)
        redis.replicaof("127.0.0.1", 1)
        jobs += run.start_jobs(5, steps=3)
        time.sleep(2)
        redis.replicaof("NO", "ONE")
        wait_started(run, jobs, since=time.time())
        run.finish(jobs)
    run.check(max(run.recoveries_s, default=0.0) <= START_S + 5, "a job started later than 20 s")
    run.check(not run.tenant.answers, f"not every request was accepted: {dict(run.tenant.answers)}")


@fault("F25", "a hint delivered after its job was cancelled", bar="not run", n=3, n_all=5)
def hint_after_cancel(run: Run) -> None:
    sender = hint_sender(run)
    for _ in run.rounds():
        with run.pace(0.2):
            busy = run.start_jobs(2, steps=9)
            for job in busy:
                run.wait_step(job)
            job = run.start_job(steps=3)
            run.tenant.wait(job, "queued")
            run.tenant.act(job, "cancel")
            sender.send(Task.RUN_JOB, str(Queue.TRAINING), job)
        run.finish()
        time.sleep(0.5)
        [row] = truth.rows(run.service.engine, "SELECT attempt, status FROM jobs WHERE id = :job", job=job)
        run.check(
            (row.attempt, row.status) == (0, "cancelled"), f"{job}: attempt {row.attempt}, {row.status}"
        )


def hint_sender(run: Run) -> Sender:
    """Sends messages as the product does."""
    return Sender(make_celery(Settings(redis_url=run.service.valkey.url)))

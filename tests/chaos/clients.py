"""Faults of clients and of the API: gone in the middle, all at once, killed, starved, crowding others."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any

import httpx
import openai
import psutil

from tests.chaos import truth
from tests.chaos.database import load
from tests.chaos.faults import Run, fault
from tests.chaos.proxy import Mode
from tests.chaos.service import TRAINING


def send_part(run: Run, head: str, body: bytes, *, read: int = 0) -> None:
    """Send a request as far as it goes, read so many bytes, and be gone with a reset."""
    with socket.create_connection(("127.0.0.1", run.service.port), timeout=10) as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        line.sendall(head.replace("\n", "\r\n").encode() + body)
        with suppress(OSError):
            if read:
                line.recv(read)


@fault(
    "F39",
    "clients vanish in the middle of uploads and of streams",
    bar="descriptors and partial files are back <= 5 s; generation stops",
    n=20,
    n_all=200,
)
def vanish(run: Run) -> None:
    api = psutil.Process(run.service.pid_of("api"))
    run.tenant.chat("tiny")
    before = api.num_fds()
    common = f"Host: x\nAuthorization: Bearer {run.tenant.key}\n"
    upload = f"POST /v1/files HTTP/1.1\n{common}Content-Length: 90000\n"
    upload += "Content-Type: multipart/form-data; boundary=b\n\n"
    part = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
    part += b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n' + b"x" * 20_000
    question = {"model": "tiny", "stream": True, "max_tokens": 300, "logit_bias": {}, "messages": []}
    question["messages"] = [{"role": "user", "content": "Tell me a long story."}]
    body = json.dumps(question).encode()
    chat = f"POST /v1/chat/completions HTTP/1.1\n{common}Content-Length: {len(body)}\n"
    chat += "Content-Type: application/json\n\n"
    for number in run.rounds():
        if number % 2:
            send_part(run, upload, part)
        else:
            send_part(run, chat, body, read=run.chance.randrange(1, 2000))
    gone_at = time.monotonic()
    while time.monotonic() < gone_at + 5:
        left = list((run.service.storage / "tmp").iterdir())
        if not left and api.num_fds() <= before + 3:
            break
        time.sleep(0.1)
    run.check(not left, f"{len(left)} partial files are left")
    run.check(api.num_fds() <= before + 3, f"the API holds {api.num_fds()} descriptors, {before} before")
    began = time.monotonic()
    run.tenant.chat("tiny")
    run.notes.append(f"an answer {time.monotonic() - began:.2f} s after {run.runs} clients had vanished")
    run.check(time.monotonic() - began < 5, "generation for nobody keeps others waiting")
    run.finish([run.start_job(steps=3)])


@fault(
    "F40", "50 parallel POSTs with one Idempotency-Key, then another body", bar="one job; 422", n=2, n_all=6
)
def same_key(run: Run) -> None:
    for _ in run.rounds():
        file, key = run.tenant.upload(), uuid.uuid4().hex
        body = {"model": "tiny", "training_file": file, "hyperparameters": {"n_epochs": 1, "batch_size": 4}}

        def post(body: dict[str, Any] = body, key: str = key) -> httpx.Response:
            headers = {"Authorization": f"Bearer {run.tenant.key}", "Idempotency-Key": key}
            url = f"{run.service.base_url}/v1/fine_tuning/jobs"
            return httpx.post(url, json=body, headers=headers, timeout=60)

        with ThreadPoolExecutor(50) as pool:
            answers = list(pool.map(lambda _: post(), range(50)))
        codes = Counter(answer.status_code for answer in answers)
        ids = {answer.json()["id"] for answer in answers if answer.status_code == 200}
        run.check(set(codes) <= {200, 409, 503}, f"answers: {dict(codes)}")
        run.check(len(ids) == 1, f"{len(ids)} jobs were made by one key")
        run.check(post().json().get("id") in ids, "the same request, later, is another job")
        other = post({**body, "suffix": "other"})
        run.check(other.status_code == 422, f"another body is answered with {other.status_code}")
        run.notes.append(f"{dict(codes)}")
        run.jobs.update(ids)
        run.finish()


@fault(
    "F41",
    "cancel at random moments of the life of a job",
    bar="cancelled or succeeded; device free <= 10 s; no later write",
    n=60,
    n_all=300,
)
def cancel_anywhere(run: Run) -> None:
    cancelled: dict[str, float] = {}

    def live_and_die(moment_s: float) -> None:
        job = run.start_job(steps=9, checkpoint_interval=3)
        time.sleep(moment_s)
        with suppress(openai.BadRequestError):  # it has ended already
            run.tenant.act(job, "cancel")
        cancelled[job] = time.monotonic()
        ended = run.tenant.get(job).status
        run.check(ended in ("cancelled", "succeeded"), f"{job} is {ended}")
        run.runs += 1

    with run.pace(0.03), ThreadPoolExecutor(6) as pool:
        list(pool.map(live_and_die, [run.chance.uniform(0.0, 4.0) for _ in range(run.n)]))
        time.sleep(2)
    freed = [step.at - cancelled[step.job] for step in truth.steps(run.service) if step.job in cancelled]
    statuses = Counter(run.tenant.get(job).status for job in cancelled)
    run.notes.append(f"{dict(statuses)}; last step of a cancelled job after {max(0.0, *freed, 0.0):.2f} s")
    run.check(max(freed, default=0.0) <= 10, "a device was free later than 10 s after the cancel")
    written = truth.rows(
        run.service.engine,
        "SELECT e.id FROM job_events e JOIN jobs j ON j.id = e.job_id WHERE j.id = ANY(:ids)"
        " AND j.status = 'cancelled' AND e.sequence > (SELECT max(c.sequence) FROM job_events c"
        " WHERE c.job_id = j.id AND c.message LIKE '%cancelled%')",
        ids=list(cancelled),
    )
    run.check(not written, f"{len(written)} events were written after a cancel")
    models = truth.rows(
        run.service.engine,
        "SELECT m.id FROM tuned_models m JOIN jobs j ON j.id = m.job_id"
        " WHERE j.status = 'cancelled' AND NOT m.is_checkpoint AND j.id = ANY(:ids)",
        ids=list(cancelled),
    )
    run.check(not models, f"{len(models)} cancelled jobs list a model")


@fault(
    "F43",
    "the API may open few descriptors and 100 clients come",
    bar="503 or no connection; recovers without restart",
    n=1,
    n_all=3,
)
def few_descriptors(run: Run) -> None:
    pid = run.service.pid_of("api")
    api = psutil.Process(pid)
    for _ in run.rounds():
        before = api.rlimit(psutil.RLIMIT_NOFILE)
        limit = max(64, api.num_fds() + 8)
        subprocess.run(["prlimit", "--pid", str(pid), f"--nofile={limit}:{before[1]}"], check=True)
        answers = crowd(run, lambda client: client.get("/v1/models"), clients=100, seconds=5)
        run.notes.append(f"limit {limit}: {dict(answers)}")
        run.check(answers["500"] == 0, f"{answers['500']} answers were 500")
        deadline = time.monotonic() + 15
        healthy = False
        while not healthy and time.monotonic() < deadline:
            with suppress(httpx.HTTPError):
                url = f"{run.service.base_url}/v1/models"
                headers = {"Authorization": f"Bearer {run.tenant.key}"}
                healthy = httpx.get(url, headers=headers, timeout=3).status_code == 200
            time.sleep(0.2)
        run.check(healthy, "still not answering 15 s after the crowd left")
        run.check(api.is_running() and run.service.parts["api"].is_alive, "the API ended")
        subprocess.run(["prlimit", "--pid", str(pid), f"--nofile={before[0]}:{before[1]}"], check=True)
        run.finish([run.start_job(steps=3)])


def crowd(
    run: Run, ask: Callable[[httpx.Client], httpx.Response], *, clients: int, seconds: float
) -> Counter[str]:
    """Many clients at once, each with a connection of its own that it keeps; how they were answered."""
    answers: Counter[str] = Counter()
    until = time.monotonic() + seconds

    def be_one() -> None:
        headers = {"Authorization": f"Bearer {run.tenant.key}"}
        with httpx.Client(base_url=run.service.base_url, headers=headers, timeout=5) as client:
            while time.monotonic() < until:
                try:
                    answers[str(ask(client).status_code)] += 1
                except httpx.HTTPError as error:
                    answers[type(error).__name__] += 1
                time.sleep(0.2)

    threads = [threading.Thread(target=be_one, daemon=True) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return answers


@fault("F44", "kill -9 of the API under load", bar="clients that retry succeed; no double job", n=2, n_all=8)
def kill_api(run: Run) -> None:
    for _ in run.rounds():
        before = int(truth.rows(run.service.engine, "SELECT count(*) AS n FROM jobs")[0].n)
        with load(run, most=16, pause_s=0.05) as made:
            for _ in range(2):
                time.sleep(run.chance.uniform(0.3, 1.5))
                run.service.parts["api"].kill()
                run.service.parts["api"].wait()
                run.service.parts["api"].start()
        after = int(truth.rows(run.service.engine, "SELECT count(*) AS n FROM jobs")[0].n)
        run.check(after - before == len(made), f"{len(made)} jobs were accepted, {after - before} were made")
        run.finish()


@fault(
    "F45",
    "a frozen engine, deaf workers, a lost database",
    bar="/readyz says so <= 10 s, and is well again after",
    n=1,
    n_all=3,
)
def lying_readiness(run: Run) -> None:
    service = run.service
    for _ in run.rounds():
        for words in ("inference frozen", "training frozen", "control deaf", "database away", "broker away"):
            with ExitStack() as mending:
                break_part(run, words, mending)
                told_s = wait_readiness(run, 503, timeout_s=20)
            run.check(told_s <= 10, f"{words}: /readyz took {told_s:.1f} s to say so")
            run.notes.append(f"{words} {told_s:.1f} s")
            run.check(wait_readiness(run, 200, timeout_s=40) < 40, f"{words}: not ready 40 s after")
            service.heal()
            service.wait_ready()
    run.finish([run.start_job(steps=3)])


def break_part(run: Run, words: str, mending: ExitStack) -> None:
    """Do what the words say; `mending` undoes it."""
    service = run.service
    match words.split():
        case ["database", _]:
            proxies = list(service.database.values())
        case ["broker", _]:
            proxies = list(service.broker.values())
        case [_, "deaf"]:
            proxies = [service.broker["control"]]
        case [kind, _]:
            for name in TRAINING if kind == "training" else (kind,):
                service.parts[name].freeze()
                mending.callback(service.parts[name].thaw)
            return
    for proxy in proxies:
        proxy.break_off(Mode.BLACKHOLE)
        mending.callback(proxy.heal)


def wait_readiness(run: Run, code: int, *, timeout_s: float) -> float:
    """How long until /readyz answers with this code."""
    began = time.monotonic()
    while time.monotonic() < began + timeout_s:
        with suppress(httpx.HTTPError):
            if httpx.get(f"{run.service.base_url}/readyz", timeout=10).status_code == code:
                return time.monotonic() - began
        time.sleep(0.2)
    return timeout_s


@fault(
    "F46",
    "one project queues 60 jobs, another one",
    bar="the other's starts at the next free slot; positions are told",
    n=1,
    n_all=3,
)
def crowding(run: Run) -> None:
    for _ in run.rounds():
        with run.pace(0.1):
            crowd_jobs = run.start_jobs(60, steps=6)
            run.wait_step(crowd_jobs[0])
            run.tenant.wait(crowd_jobs[-1], "queued")
            most = count_waiting(run, crowd_jobs, "queued", "validating_files")
            last = run.tenant.get(crowd_jobs[-1])
            least = count_waiting(run, crowd_jobs, "queued")
            position = (last.luthier or {}).get("queue_position")
            run.check(
                isinstance(position, int) and least <= position <= most,
                f"the last is told position {position}, with {least} to {most} waiting",
            )
            asked = time.time()
            one = run.tenants[1].create(steps=3)
            run.jobs.add(one)
            run.tenants[1].wait(one, timeout_s=60)
        begun = min(truth.claims(run.service, one).values()).timestamp()
        queued = truth.rows(
            run.service.engine,
            "SELECT min(created_at) AS at FROM job_events"
            " WHERE job_id = :job AND message LIKE '%queued state%'",
            job=one,
        )[0].at.timestamp()
        between = [
            job
            for job in crowd_jobs
            if any(queued < at.timestamp() < begun for at in truth.claims(run.service, job).values())
        ]
        run.notes.append(f"B began {begun - asked:.1f} s after it was asked for, {len(between)} of A between")
        started = len(between)  # each worker may have been taking one at that very moment
        run.check(started <= len(TRAINING), f"{started} jobs of A began while the job of B waited")
        run.finish()


def count_waiting(run: Run, jobs: list[str], *states: str) -> int:
    """How many of these jobs are in one of the states."""
    query = "SELECT count(*) AS n FROM jobs WHERE id = ANY(:ids) AND status = ANY(:states)"
    return int(truth.rows(run.service.engine, query, ids=jobs, states=list(states))[0].n)

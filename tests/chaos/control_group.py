"""The control group: four of the faults against a stock Celery on such a broker, to show what is at stake.

Nothing of the product runs here. Each trial has a broker and two workers of its own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import redis
from celery import Celery
from sqlalchemy import make_url

from app.cli.process_commands import SOURCE_ROOT
from app.cli.valkey import prepare_valkey, wait_for_valkey
from tests.chaos.parts import Server
from tests.chaos.proxy import Proxy
from tests.chaos.run import say

PATIENCE_S = 45.0  # far longer than this project's bar of 15 s


@dataclass
class Stock:
    """A broker and two stock workers."""

    broker: redis.Redis
    line: Proxy  # between workers and broker
    workers: list[subprocess.Popen[bytes]]
    sender: Celery
    file: Path

    def send(self, count: int, *, seconds: float) -> list[str]:
        """So many jobs."""
        names = [f"job-{number}" for number in range(count)]
        for name in names:
            self.sender.send_task("tests.chaos.stock_queue.work", args=(name, seconds))
        return names

    def told(self, word: str) -> Counter[str]:
        """How often each job has started, or ended."""
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        return Counter(line.split()[1] for line in lines if line.startswith(word))

    def wait(self, word: str, count: int, *, timeout_s: float = PATIENCE_S) -> None:
        """Until so many jobs have started or ended, or patience is over."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and len(self.told(word)) < count:
            time.sleep(0.1)


def flush(stock: Stock) -> list[str]:
    """F16: FLUSHALL with two running and 18 queued."""
    names = stock.send(20, seconds=1.0)
    stock.wait("start", 2)
    stock.broker.flushall()
    stock.wait("end", 20)
    return names


def kill_connections(stock: Stock) -> list[str]:
    """F18: CLIENT KILL of all connections every 2 s while two jobs of 12 s run."""
    names = stock.send(4, seconds=12.0)
    stock.wait("start", 2)
    for _ in range(5):
        time.sleep(2)
        stock.broker.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    stock.wait("end", 4)
    time.sleep(13)
    return names


def swallow(stock: Stock) -> list[str]:
    """F20: the reply that carries a job is lost on its way."""
    stock.line.swallow_reply(b"tests.chaos.stock_queue.work")
    names = stock.send(1, seconds=0.5)
    stock.wait("end", 1)
    return names


def kill_worker(stock: Stock) -> list[str]:
    """F03: kill -9 of one whole worker in the middle of its job."""
    names = stock.send(2, seconds=5.0)
    stock.wait("start", 2)
    kill_tree(stock.workers[0])
    stock.wait("end", 2)
    return names


TRIALS: dict[str, Callable[[Stock], list[str]]] = {
    "F16": flush,
    "F18": kill_connections,
    "F20": swallow,
    "F03": kill_worker,
}


def run_control_group(folder: Path) -> None:
    """Every trial with early and with late acknowledgement; one line each."""
    for id, trial in TRIALS.items():
        for late in (False, True):
            name = f"{id}-{'late' if late else 'early'}"
            with stock_queue(folder / name, late=late) as stock:
                names = trial(stock)
                started, ended = stock.told("start"), stock.told("end")
            lost = [name for name in names if not ended[name]]
            doubled = [name for name in names if started[name] > 1]
            say(
                f"{id}  stock Celery, acks {'late ' if late else 'early'}: {len(names)} jobs, "
                f"not done {PATIENCE_S:g} s later: {len(lost)}, started twice: {len(doubled)}  "
                f"{trial.__doc__}"
            )


@contextmanager
def stock_queue(folder: Path, *, late: bool) -> Iterator[Stock]:
    """A broker of its own, two workers behind a proxy."""
    folder.mkdir(parents=True)
    server = Server("valkey", prepare_valkey(folder / "valkey", "only-for-tests"), folder / "valkey.log")
    server.start()
    wait_for_valkey(server.url)
    line = Proxy(server.port)
    url = make_url(server.url).set(port=line.port).render_as_string(hide_password=False)
    workers: list[subprocess.Popen[bytes]] = []
    try:
        for number in range(2):
            workers.append(start_worker(folder, url, number=number, late=late))
        sender = Celery("sender", broker=server.url, set_as_current=False)
        broker = redis.Redis.from_url(server.url)
        stock = Stock(broker, line, workers, sender, folder / "told")
        for number in range(2):
            wait_ready(folder / f"worker-{number}.log")
        yield stock
    finally:
        for worker in workers:
            kill_tree(worker)
        line.close()
        server.stop()


def start_worker(folder: Path, url: str, *, number: int, late: bool) -> subprocess.Popen[bytes]:
    """One stock worker with one slot."""
    environment = os.environ | {
        "STOCK_BROKER": url,
        "STOCK_FILE": str(folder / "told"),
        "STOCK_ACKS_LATE": "1" if late else "",
        "PYTHONPATH": str(SOURCE_ROOT),
        "PYTHONWARNINGS": "ignore",
    }
    argv = [sys.executable, "-m", "celery", "-A", "tests.chaos.stock_queue", "worker"]
    argv += ["--concurrency", "1", "--hostname", f"stock-{number}", "--loglevel", "INFO"]
    with (folder / f"worker-{number}.log").open("wb") as output:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *argv],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            cwd="/",
        )


def wait_ready(log: Path, *, timeout_s: float = 60.0) -> None:
    """Until the worker says that it is."""
    deadline = time.monotonic() + timeout_s
    while " ready." not in log.read_text():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{log.name}: {log.read_text()[-500:]}")
        time.sleep(0.1)


def kill_tree(worker: subprocess.Popen[bytes]) -> None:
    """SIGKILL a worker and its pool."""
    doomed = []
    with suppress(psutil.Error):
        doomed = psutil.Process(worker.pid).children(recursive=True)
    with suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    for process in doomed:
        with suppress(psutil.Error):
            process.kill()
    worker.wait(timeout=20)

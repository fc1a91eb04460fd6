"""I10: no trainer lives without its worker. Looks at this machine's processes only."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial

import psutil
from sqlalchemy.orm import Session

from app.core.fsck.finding import Finding, Site

_GONE_S = 2.0  # how long a killed group may take to leave the process table
_TRAINER = ("-m", "worker.training", "--worker")
_WORKER = re.compile(r"(?P<host>.+)-(?P<pid>[0-9]+)-[A-Za-z0-9]+")  # as worker/context.py names it


def check_trainers(_site: Site) -> Iterator[Finding]:
    """Every trainer has a living worker above it, the one it was started for."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            worker = _worker_of(process)
            if worker is not None and not _has_worker(process, worker):
                begun = process.create_time()
                repair = partial(_end, pid=process.pid, begun=begun)
                problem = f"a trainer without its worker {worker}"
                yield Finding("I10", f"process {process.pid}", problem, "kill its group", repair=repair)


def _worker_of(process: psutil.Process) -> str | None:
    """The name of the worker a trainer was started for; None for every other process, and for dead ones."""
    words = process.cmdline()
    for at in range(len(words) - len(_TRAINER)):
        if tuple(words[at : at + len(_TRAINER)]) == _TRAINER:
            return None if process.status() == psutil.STATUS_ZOMBIE else str(words[at + len(_TRAINER)])
    return None


def _has_worker(process: psutil.Process, worker: str) -> bool:
    """One of another host or container cannot be seen; then any process above the trainer will do."""
    above = {parent.pid for parent in process.parents() if parent.status() != psutil.STATUS_ZOMBIE}
    named = _WORKER.fullmatch(worker)
    if named is not None and named["host"] == socket.gethostname():
        return int(named["pid"]) in above
    return bool(above - {1})


def _end(_session: Session, *, pid: int, begun: float) -> bool:
    """Kill the group the trainer leads, and see it gone. The id alone would not do: ids come again."""
    try:
        process = psutil.Process(pid)
        if process.create_time() != begun:
            return False
        if os.getpgid(pid) == pid:
            os.killpg(pid, signal.SIGKILL)
        else:
            process.kill()
        deadline = time.monotonic() + _GONE_S
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
    except (psutil.NoSuchProcess, ProcessLookupError):
        return True
    except (psutil.AccessDenied, PermissionError):
        return False
    return True

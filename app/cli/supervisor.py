"""Keeps a set of processes running and ends them in order. Knows neither Luthier nor what they do.

Each part runs on a leash (`leash.py`) whose pipe this process holds: closing it, on purpose or by dying,
ends the part. Everything happens in `tick`, called a few times a second; there are no threads.
"""

from __future__ import annotations

import logging
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

log = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.5
LAST_BACKOFF_S = 30.0
STEADY_S = 60.0  # a part that ran so long starts over with the first backoff
LEASH_SLACK_S = 3.0  # on top of a part's grace, for its leash to kill and sweep
LARGEST_LOG_BYTES = 50 * 2**20
_ALARMING = re.compile(r"\b(WARNING|ERROR|CRITICAL|FATAL|PANIC)\b")
_ECHOED_BYTES = 400


@dataclass(frozen=True, slots=True)
class Part:
    """One process to keep running. `argv` is leashed already; `grace_s` is what its leash was told."""

    name: str
    argv: Sequence[str]
    log_file: Path | None  # None: our own output
    env: Mapping[str, str] | None = None
    grace_s: float = 10.0
    cwd: Path = Path("/")


@dataclass(slots=True)
class _Running:
    part: Part
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    backoff_s: float = 0.0
    start_again_at: float | None = None
    read_bytes: int = 0
    starts: int = 0


class Supervisor:
    """Running parts, in the order they were started."""

    def __init__(self, echo: Callable[[str], None], *, inherited: Sequence[int] = ()) -> None:
        """`echo` shows a line to the operator; `inherited` are descriptors every leash keeps open."""
        self._echo = echo
        self._inherited = tuple(inherited)
        self._parts: dict[str, _Running] = {}

    def start(self, part: Part) -> None:
        """Start a part and keep it running from now on."""
        running = _Running(part, backoff_s=FIRST_BACKOFF_S)
        self._parts[part.name] = running
        if part.log_file is not None and part.log_file.exists():
            running.read_bytes = part.log_file.stat().st_size
        self._launch(running)

    def tick(self) -> None:
        """Notice parts that ended, start them again when their time has come, show alarming log lines."""
        now = time.monotonic()
        for running in self._parts.values():
            self._show_alarms(running)
            if running.process is not None and running.process.poll() is not None:
                self._note_end(running, now)
            if running.start_again_at is not None and now >= running.start_again_at:
                self._launch_again(running, now)

    def mark_read(self, name: str) -> None:
        """Do not echo what a part has logged so far: servers complain while they start."""
        running = self._parts[name]
        if running.part.log_file is not None:
            running.read_bytes = running.part.log_file.stat().st_size

    def starts(self, name: str) -> int:
        """How often a part was started."""
        return self._parts[name].starts

    def pid(self, name: str) -> int | None:
        """The process id of a part's leash while it runs."""
        process = self._parts[name].process
        return None if process is None or process.poll() is not None else process.pid

    def stop(self, names: Sequence[str] | None = None) -> None:
        """End the parts named (all: the last started first), together, and wait until they are gone."""
        if names is None:
            for name in reversed(list(self._parts)):
                self.stop([name])
            return
        stopping = [self._parts.pop(name) for name in names if name in self._parts]
        for running in stopping:
            _let_go(running)
        for running in stopping:
            _wait_gone(running)
            self._show_alarms(running)

    def _launch(self, running: _Running) -> None:
        part = running.part
        with _open_log(part.log_file) as output:
            running.process = subprocess.Popen(
                list(part.argv),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=None if output is None else subprocess.STDOUT,
                env=None if part.env is None else dict(part.env),
                cwd=part.cwd,
                pass_fds=self._inherited,
            )
        running.started_at = time.monotonic()
        running.start_again_at = None
        running.starts += 1
        level = logging.INFO if running.starts == 1 else logging.WARNING
        log.log(level, "started part=%s pid=%d start=%d", part.name, running.process.pid, running.starts)

    def _launch_again(self, running: _Running, now: float) -> None:
        """A full disk or a machine out of processes must not end the parts that live: try later."""
        try:
            self._launch(running)
        except OSError as error:
            self._wait(running, now, cause=f"no start, {error.strerror}")

    def _note_end(self, running: _Running, now: float) -> None:
        assert running.process is not None
        _let_go(running)
        code = running.process.returncode
        running.process = None
        if now - running.started_at >= STEADY_S:
            running.backoff_s = FIRST_BACKOFF_S
        self._wait(running, now, cause=describe_exit(code))

    def _wait(self, running: _Running, now: float, *, cause: str) -> None:
        running.start_again_at = now + running.backoff_s
        log.warning(
            "ended part=%s cause=%s again_in_s=%.1f log=%s",
            running.part.name,
            cause,
            running.backoff_s,
            running.part.log_file,
        )
        running.backoff_s = min(running.backoff_s * 2, LAST_BACKOFF_S)

    def _show_alarms(self, running: _Running) -> None:
        """Echo new warnings and errors of a part's log, and keep the log from filling the disk."""
        path = running.part.log_file
        if path is None:
            return
        try:
            with path.open("rb") as file:
                file.seek(running.read_bytes)
                text = file.read()
        except OSError:
            return
        whole = text[: text.rfind(b"\n") + 1]
        running.read_bytes += len(whole)
        for line in whole.decode("utf-8", "replace").splitlines():
            if _ALARMING.search(line):
                with suppress(OSError):  # a terminal that is gone, or a full disk behind `>`
                    self._echo(f"{running.part.name}: {line[:_ECHOED_BYTES]}")
        if running.read_bytes > LARGEST_LOG_BYTES:
            _turn_over(path)
            running.read_bytes = 0


def describe_exit(code: int) -> str:
    """What ended a process, from its leash's exit code."""
    return f"signal {code - 128}" if code > 128 else f"exit code {code}"


@contextmanager
def _open_log(path: Path | None) -> Iterator[BinaryIO | None]:
    if path is None:
        yield None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as output:
        yield output


def _let_go(running: _Running) -> None:
    if running.process is not None and running.process.stdin is not None:
        running.process.stdin.close()


def _wait_gone(running: _Running) -> None:
    if running.process is None:
        return
    try:
        running.process.wait(timeout=running.part.grace_s + LEASH_SLACK_S)
    except subprocess.TimeoutExpired:
        log.error("leash stuck part=%s pid=%d", running.part.name, running.process.pid)
        running.process.kill()  # its own death signal ends the part
        running.process.wait()
    level = logging.WARNING if running.process.returncode == 128 + signal.SIGKILL else logging.INFO
    log.log(level, "stopped part=%s cause=%s", running.part.name, describe_exit(running.process.returncode))


def _turn_over(path: Path) -> None:
    """Move a large log aside by copying: its writer holds the file open and appends.

    Where there is no room for the copy, emptying the log is what makes some.
    """
    old = path.with_suffix(".old.log")
    try:
        with path.open("rb") as source, old.open("wb") as target:
            while chunk := source.read(2**20):
                target.write(chunk)
    except OSError as error:
        log.warning("log not kept file=%s cause=%s", path, error.strerror)
        with suppress(OSError):
            old.unlink(missing_ok=True)  # half a copy
    with suppress(OSError), path.open("r+b") as file:
        file.truncate(0)

"""The processes of a private service, each in a session of its own, to be killed, frozen and started again.

They die with the thread that started them, so that a killed harness leaves nothing behind.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from app.cli.embedded import ServerCommand

TRAINER = "worker.training"


class Part:
    """One process: how to start it, its log, and ways to hurt it."""

    def __init__(self, name: str, argv: Sequence[str], log: Path, env: Mapping[str, str]) -> None:
        self.name = name
        self.argv = list(argv)
        self.log = log
        self.env = dict(env)
        self.wrapper: list[str] = []  # strace, faketime, prlimit: stands before the command at the next start
        self.extra_env: dict[str, str] = {}  # for the next start
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of the process itself, or of the wrapper in front of it."""
        assert self.process is not None
        return self.process.pid

    @property
    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Start it unless it runs."""
        if self.is_alive:
            return
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *self.wrapper, *self.argv],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.env | self.extra_env,
                start_new_session=True,
                cwd="/",
            )

    def kill(self, number: int = signal.SIGKILL) -> float:
        """Signal the process alone; returns when."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)
        return time.time()

    def kill_tree(self) -> float:
        """SIGKILL it and all below it at once."""
        doomed = [psutil.Process(self.pid), *self.children()] if self.is_alive else []
        for process in doomed:
            with suppress(psutil.Error):
                process.kill()
        return time.time()

    def wait(self, *, timeout_s: float = 30.0) -> int:
        """Its exit code."""
        assert self.process is not None
        return self.process.wait(timeout=timeout_s)

    def stop(self, *, timeout_s: float = 30.0) -> None:
        """Ask it to end; SIGKILL its tree when it does not."""
        if self.is_alive:
            self.kill(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.wait(timeout_s=timeout_s)
                return
            self.kill_tree()
            self.wait(timeout_s=10)

    def children(self) -> list[psutil.Process]:
        """All below it."""
        with suppress(psutil.Error):
            return psutil.Process(self.pid).children(recursive=True)
        return []

    def trainer(self) -> psutil.Process | None:
        """The child that trains, of a training worker."""
        for child in self.children():
            with suppress(psutil.Error):
                if TRAINER in child.cmdline():
                    return child
        return None

    def freeze(self) -> None:
        """SIGSTOP the whole tree, as a frozen virtual machine would be."""
        for process in (*self.children(), psutil.Process(self.pid)):
            with suppress(psutil.Error):
                process.suspend()

    def thaw(self) -> None:
        """Let the tree go on."""
        for process in (psutil.Process(self.pid), *self.children()):
            with suppress(psutil.Error):
                process.resume()


class Server(Part):
    """A database or broker on its leash, at the same port each time it is started."""

    def __init__(self, name: str, command: ServerCommand, log: Path) -> None:
        super().__init__(name, command.argv, log, os.environ)
        self.url = command.url
        self.port = int(command.url.rsplit(":", 1)[1].split("/")[0])
        self._hold: int | None = None

    def start(self) -> None:
        """The leash ends its program when its standard input closes: with this process, too."""
        if self.is_alive:
            return
        read_end, self._hold = os.pipe()
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self.argv, stdin=read_end, stdout=output, stderr=subprocess.STDOUT, cwd="/"
            )
        os.close(read_end)

    def program(self) -> psutil.Process:
        """The server behind its leash."""
        return psutil.Process(self.pid).children()[0]

    def crash(self, number: int = signal.SIGKILL) -> float:
        """End the server without its leave; returns when it was gone."""
        self.program().send_signal(number)
        self.wait()
        self._let_go()
        return time.time()

    def stop(self, *, timeout_s: float = 30.0) -> None:
        """End it in order."""
        self._let_go()
        if self.process is not None:
            self.wait(timeout_s=timeout_s)

    def _let_go(self) -> None:
        if self._hold is not None:
            os.close(self._hold)
            self._hold = None


def trainers() -> list[psutil.Process]:
    """Every trainer on this machine, whoever started it."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if TRAINER in (process.info["cmdline"] or []):
            found.append(process)
    return found

"""The trainer: one warm child process that trains, and the only way to talk to it. Never imports torch.

The child leads its own session and process group. Ending it means: ask, wait, kill the group, and
see it gone, before anything else may use the device.
"""

from __future__ import annotations

import logging
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from pydantic import ValidationError

from worker.training.words import TRAIN_WORD, Ready, TrainSpec, TrainWord

log = logging.getLogger(__name__)
# The child reads users' data and needs none of the machine's addresses or passwords.
_PRIVATE = re.compile(
    r"^(LUTHIER|PG|AWS)_?|(^|_)(PASSWORD|PASSWD|SECRET|TOKEN|KEY|CREDENTIALS?)(_|$)|^(DATABASE|REDIS|BROKER)_URL$"
)
_SOURCE_ROOT = Path(__file__).parents[1]
_GONE_S = 2.0  # how long a killed group may take to leave the process table
_LONGEST_WORD = 2**20  # bytes of one line; the protocol's words are far smaller


class TrainerDiedError(Exception):
    """The child process ended; the text says how, in words for the job's events."""


class Trainer:
    """Starts the child, feeds it one job at a time, ends it. Any thread may call `start` and `stop`."""

    def __init__(self, *, grace_s: float, worker: str) -> None:
        self._worker = worker
        self._grace_s = grace_s
        self._process: subprocess.Popen[bytes] | None = None
        self._words: queue.Queue[TrainWord | None] = queue.Queue()
        self._ready = threading.Event()
        self._lock = threading.Lock()

    @property
    def is_ready(self) -> bool:
        """Whether a living child has its imports behind it."""
        process = self._process
        return self._ready.is_set() and process is not None and process.poll() is None

    def start(self) -> None:
        """Start a child; it says `Ready` once its imports are done. No effect while one lives."""
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                return
            self._release()
            self._words = queue.Queue()
            self._ready = threading.Event()
            environment = {k: v for k, v in os.environ.items() if not _PRIVATE.search(k)}
            # The child keeps its folder out of its path (-P) and must find this very code all the same.
            paths = [str(_SOURCE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
            environment["PYTHONPATH"] = os.pathsep.join(paths)
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "worker.training", "--worker", self._worker],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                start_new_session=True,
            )
            assert self._process.stdout is not None
            heard = (self._process.stdout, self._words, self._ready)
            threading.Thread(target=_read, args=heard, name="trainer-words", daemon=True).start()

    def wait_ready(self, *, timeout_s: float) -> bool:
        """Whether the child has come up within the time; raises TrainerDiedError when it ended instead."""
        deadline = time.monotonic() + timeout_s
        while not self._ready.wait(min(0.2, timeout_s)):
            process = self._process
            if process is None or process.poll() is not None:
                raise TrainerDiedError(self._how_it_ended())
            if time.monotonic() > deadline:
                return False
        return True

    def send(self, spec: TrainSpec) -> None:
        """Give the child a job."""
        process = self._process
        if process is None or process.stdin is None:
            raise TrainerDiedError(self._how_it_ended())
        try:
            process.stdin.write(spec.model_dump_json().encode() + b"\n")
            process.stdin.flush()
        except (OSError, ValueError):  # broken, or closed by `stop`
            raise TrainerDiedError(self._how_it_ended()) from None

    def next_word(self, *, timeout_s: float) -> TrainWord | None:
        """The next word, None when none came in time; raises TrainerDiedError at the child's end."""
        try:
            word = self._words.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if word is None:
            raise TrainerDiedError(self._how_it_ended())
        return word

    def stop(self) -> None:
        """End the child and all it started, and see it gone."""
        with self._lock:
            process = self._process
            if process is not None and process.poll() is None:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=self._grace_s)
            self._release()

    def _release(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # the child leads its group; what it started goes too
        process.wait(timeout=30)
        _see_gone(process.pid)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()

    def _how_it_ended(self) -> str:
        process = self._process
        if process is None:
            return "The trainer was stopped."
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=self._grace_s)
        code = process.returncode
        if code is None:
            return "The trainer closed its output without ending."
        if code >= 0:
            return f"The trainer ended with exit code {code}."
        cause = " (out of memory, most likely)" if code == -signal.SIGKILL else ""
        return f"The trainer was killed by {_signal_name(-code)}{cause}."


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal, which has no name of its own
        return f"signal {number}"


def _see_gone(group: int) -> None:
    """Wait until no process of the group is left; macOS answers EPERM for a group of zombies."""
    deadline = time.monotonic() + _GONE_S
    with suppress(ProcessLookupError, PermissionError):
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(0.01)
        log.warning("processes of the trainer's group %d are still listed", group)


def _read(stream: IO[bytes], words: queue.Queue[TrainWord | None], ready: threading.Event) -> None:
    with suppress(ValueError, OSError):  # the pipe was closed
        while line := stream.readline(_LONGEST_WORD):
            try:
                word = TRAIN_WORD.validate_json(line)
            except ValidationError:
                log.error("the trainer said something that is no word: %d bytes", len(line))
                continue
            if isinstance(word, Ready):
                ready.set()
            else:
                words.put(word)
    words.put(None)

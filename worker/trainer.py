"""The trainer: one warm child process that trains, and the only way to talk to it. Never imports torch.

The child leads its own session and process group and dies with this process. Ending it means: ask, wait,
kill its whole tree, and see it gone, before anything else may use the device.
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
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import suppress
from pathlib import Path
from typing import IO

from pydantic import ValidationError

from app.core.failures import FailureCode
from worker.cgroup import MemoryKills
from worker.process_tree import ProcessTree
from worker.training.words import TRAIN_WORD, Ready, TrainSpec, TrainWord

log = logging.getLogger(__name__)
# The child reads users' data and needs none of the machine's addresses or passwords.
_PRIVATE = re.compile(
    r"^(LUTHIER|PG|AWS)_?|(^|_)(PASSWORD|PASSWD|SECRET|TOKEN|KEY|CREDENTIALS?)(_|$)|^(DATABASE|REDIS|BROKER)_URL$"
)
_SOURCE_ROOT = Path(__file__).parents[1]
_ASK_AGAIN_S = 0.5  # the first request ends a job with a checkpoint, the next one the idle child
_GLANCE_S = 0.5  # how often to see whether the child still lives
_LAST_WORDS_S = 0.2  # until all that a dead child has said is read
_END_S = 2.0  # a child that closed its output has ended by then
_LONGEST_WORD = 2**20  # bytes of one line; the protocol's words are far smaller


class TrainerDiedError(Exception):
    """The child process ended; `code` and text say how, in words for the job's events."""

    def __init__(self, message: str, code: FailureCode = FailureCode.TRAINER_DIED) -> None:
        super().__init__(message)
        self.code = code


class Trainer:
    """Starts the child, feeds it one job at a time, ends it. Any thread may start and end it."""

    def __init__(self, *, grace_s: float, worker: str, memory_bytes: int | None = None) -> None:
        self._grace_s = grace_s
        self._worker = worker
        self._memory_bytes = memory_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._is_ending = False  # killed, and not yet seen gone
        self._tree: ProcessTree | None = None
        self._words: queue.Queue[TrainWord | None] = queue.Queue()
        self._ready: Future[Ready] = Future()
        self._before: Ready | None = None  # what the child before this one said
        self._lock = threading.Lock()
        self._memory_kills: MemoryKills | None = None
        # Linux ends the child with the thread that started it, so that thread has to stay.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="trainer-starter")

    @property
    def is_ready(self) -> bool:
        """Whether a living child has its imports behind it."""
        return self._ready.done() and self._is_alive

    @property
    def device(self) -> Ready | None:
        """What a child that is ready says of its device; or the one before it said: ended ones are replaced.

        None where neither came up.
        """
        return self._ready.result() if self._ready.done() else self._before

    def start(self) -> None:
        """Start a child; it says `Ready` once its imports are done. No effect while one lives.

        Raises TrainerDiedError while something of the last one cannot be ended.
        """
        with self._lock:
            if self._is_alive:
                return
            if not self._release():
                raise TrainerDiedError("Processes of an earlier training run hold the device.")
            self._words = queue.Queue()
            self._before = self._ready.result() if self._ready.done() else None
            self._ready = Future()
            self._tree = self._tree or ProcessTree.make(memory_bytes=self._memory_bytes)
            self._tree.guard()
            process = self._starter.submit(self._spawn, self._tree.environment).result()
            self._tree.take_in(process.pid)
            self._memory_kills = MemoryKills(process.pid)
            self._process = process
            assert process.stdout is not None
            heard = (process.stdout, self._words, self._ready)
            threading.Thread(target=_read, args=heard, name="trainer-words", daemon=True).start()

    def wait_ready(self, *, timeout_s: float) -> bool:
        """Whether the child has come up within the time; raises TrainerDiedError when it ended instead."""
        deadline = time.monotonic() + timeout_s
        while not wait_for([self._ready], timeout=min(0.2, timeout_s)).done:
            process = self._process
            if process is None or process.poll() is not None:
                raise self._death()
            if time.monotonic() > deadline:
                return False
        return True

    def send(self, spec: TrainSpec) -> None:
        """Give the child a job."""
        process = self._process
        if process is None or process.stdin is None:
            raise self._death()
        if self._memory_kills is not None:
            self._memory_kills.note()
        try:
            process.stdin.write(spec.model_dump_json().encode() + b"\n")
            process.stdin.flush()
        except (OSError, ValueError):  # broken, or closed by `kill`
            raise self._death() from None

    def next_word(self, *, timeout_s: float) -> TrainWord | None:
        """The next word, None when none came in time; raises TrainerDiedError at the child's end."""
        words, process = self._words, self._process
        deadline = time.monotonic() + timeout_s
        while True:
            # Its output may be held open by something it started, so its end shows nowhere but here.
            is_over = process is None or process.poll() is not None
            wait_s = _LAST_WORDS_S if is_over else min(_GLANCE_S, max(0.0, deadline - time.monotonic()))
            with suppress(queue.Empty):
                word = words.get(timeout=wait_s)
                if word is None:
                    words.put(None)  # it stays dead for whoever asks again
                    raise self._death()
                return word
            if is_over:
                raise self._death()
            if time.monotonic() >= deadline:
                return None

    def ask_to_stop(self) -> None:
        """Have the child end its job with a checkpoint and `Stopped`, or itself where it has none."""
        process = self._process
        if process is not None:
            process.terminate()

    def kill(self) -> bool:
        """End the child and all it started at once; True once nothing of it is left. Safe to repeat.

        After False nothing can be started: the next `start` tries to end the rest first.
        """
        self._strike()  # before the lock: another thread may hold it for as long as it waits for the child
        with self._lock:
            return self._release()

    def end_strays(self) -> None:
        """End what a job left beside the child, which stays warm for the next one."""
        with self._lock:
            process = self._process
            if self._is_alive and self._tree is not None and process is not None:
                self._tree.end_strays(keep=process.pid)

    def stop(self) -> None:
        """End the child for good: ask it, give it time, kill what is left of it."""
        with self._lock:
            process = self._process
            deadline = time.monotonic() + self._grace_s
            while process is not None and process.poll() is None and time.monotonic() < deadline:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=min(_ASK_AGAIN_S, self._grace_s))
            self._release()
            if self._tree is not None:
                self._tree.close()
                self._tree = None

    @property
    def _is_alive(self) -> bool:
        process = self._process
        return process is not None and process.poll() is None and not self._is_ending

    def _spawn(self, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        kept = {name: value for name, value in os.environ.items() if not _PRIVATE.search(name)}
        # The child keeps its folder out of its path (-P) and must find this very code all the same.
        paths = [str(_SOURCE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        names = ["--worker", self._worker, "--parent", str(os.getpid())]
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "worker.training", *names],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=kept | {"PYTHONPATH": os.pathsep.join(paths)} | environment,
            start_new_session=True,
        )

    def _strike(self) -> None:
        process = self._process
        if process is not None:
            with suppress(ProcessLookupError, PermissionError):  # macOS says the latter of zombies
                os.killpg(process.pid, signal.SIGKILL)

    def _release(self) -> bool:
        self._is_ending = True
        self._strike()
        gone = self._tree is None or self._tree.kill()
        process = self._process
        if process is not None and gone:
            try:
                process.wait(timeout=_END_S)
            except subprocess.TimeoutExpired:
                return False
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(OSError):
                        pipe.close()
            self._process = None
        self._is_ending = not gone
        return gone

    def _death(self) -> TrainerDiedError:
        process = self._process
        if process is None:
            return TrainerDiedError("The trainer was stopped.")
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_END_S)
        code = process.returncode
        if code is None:
            return TrainerDiedError("The trainer closed its output without ending.")
        if code >= 0:
            return TrainerDiedError(f"The trainer ended with exit code {code}.")
        if code == -signal.SIGKILL and self._memory_kills is not None and self._memory_kills.any_since:
            return TrainerDiedError(
                "The machine ran out of memory, and the system ended the trainer. Lower batch_size or "
                "luthier.max_length, choose the qlora adapter, or use a machine with more memory.",
                FailureCode.HOST_OUT_OF_MEMORY,
            )
        return TrainerDiedError(f"The trainer was killed by {_signal_name(-code)}.")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal, which has no name of its own
        return f"signal {number}"


def _read(stream: IO[bytes], words: queue.Queue[TrainWord | None], ready: Future[Ready]) -> None:
    with suppress(ValueError, OSError):  # the pipe was closed
        while line := stream.readline(_LONGEST_WORD):
            try:
                word = TRAIN_WORD.validate_json(line)
            except ValidationError:
                log.error("the trainer said something that is no word: %d bytes", len(line))
                continue
            if isinstance(word, Ready):
                if not ready.done():
                    ready.set_result(word)
            else:
                words.put(word)
    words.put(None)

"""The warm child process of the training worker: one TrainSpec a line on stdin, words as lines on stdout.

`python -m worker.training --worker NAME --parent PID`. It lives as long as its parent and no longer; what
its words mean to a job it does not know.
"""

from __future__ import annotations

import argparse
import os
import queue
import signal
import sys
import threading
import traceback
from types import FrameType
from typing import TYPE_CHECKING, BinaryIO

from worker.threads import wait_briefly
from worker.training.lifeline import die_with_parent
from worker.training.words import Ready, Stopped, TrainSpec, TrainWord

if TYPE_CHECKING:
    from worker.training.model import WarmBase


class Lines:
    """The two pipes to the parent, kept where no library can print into them or read from them."""

    def __init__(self) -> None:
        self._words: BinaryIO = os.fdopen(os.dup(1), "wb", buffering=0)
        self._specs: BinaryIO = os.fdopen(os.dup(0), "rb")
        os.dup2(2, 1)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        self._queue: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def start(self) -> None:
        """Listen from a thread, so that the end of the pipe is seen in the middle of a step too."""
        threading.Thread(target=self._read, daemon=True).start()

    def next_line(self) -> bytes:
        return self._queue.get()

    def say(self, word: TrainWord) -> None:
        try:
            self._words.write(word.model_dump_json().encode() + b"\n")
        except BrokenPipeError:  # nobody listens any more
            os._exit(0)

    def _read(self) -> None:
        for line in self._specs:
            self._queue.put(line)
        os._exit(0)


class Ask:
    """SIGTERM: the end of the present job, with a checkpoint; where there is none, of this process."""

    def __init__(self) -> None:
        self.heard = threading.Event()
        self.is_busy = False

    def __call__(self, _signal: int, _frame: FrameType | None) -> None:
        if not self.is_busy:
            os._exit(0)
        self.heard.set()


def main() -> None:
    """Answer specs until stdin closes."""
    options = argparse.ArgumentParser()
    options.add_argument("--worker", help="whose child this is; only to be seen in lists of processes")
    options.add_argument("--parent", type=int, help="its process id")
    die_with_parent(options.parse_args().parent)
    wait_briefly()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    lines = Lines()
    lines.start()
    from transformers.utils import logging

    from worker.base_model import memory_of, pick_device
    from worker.training.model import WarmBase

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    warm = WarmBase(pick_device())
    ask = Ask()
    signal.signal(signal.SIGTERM, ask)
    memory_bytes = memory_of(warm.device)
    lines.say(Ready(device=warm.device.type, number_bytes=warm.dtype.itemsize, memory_bytes=memory_bytes))
    while True:
        line = lines.next_line()
        ask.is_busy = True
        word = _answer(lines, line, warm, stop=ask.heard)
        ask.is_busy = False
        if ask.heard.is_set() and not isinstance(word, Stopped):
            return  # asked when there was nothing left to stop but this process
        ask.heard.clear()


def _answer(lines: Lines, line: bytes, warm: WarmBase, *, stop: threading.Event) -> TrainWord:
    """Say all words of one job; returns the last."""
    from worker.serving.scoring import AnswerScorer
    from worker.training.errors import server_error
    from worker.training.loop import train

    word: TrainWord = server_error().word
    try:
        for word in train(TrainSpec.model_validate_json(line), warm, stop=stop, server=AnswerScorer):
            lines.say(word)
    except Exception:
        traceback.print_exc(file=sys.stderr)
        warm.drop()
        word = server_error().word
        lines.say(word)
    return word


if __name__ == "__main__":
    main()

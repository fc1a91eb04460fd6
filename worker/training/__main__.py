"""The warm child process of the training worker: one TrainSpec a line on stdin, words as lines on stdout.

`python -m worker.training`. It lives as long as its parent and no longer; what its words mean to a job it
does not know.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING, BinaryIO

from worker.threads import wait_briefly
from worker.training.words import Ready, TrainSpec, TrainWord

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
        """Watch the parent from threads, so that its death is seen in the middle of a step too."""
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=_die_with_parent, args=(os.getppid(),), daemon=True).start()

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


def main() -> None:
    """Answer specs until stdin closes."""
    wait_briefly()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    lines = Lines()
    lines.start()
    from transformers.utils import logging

    from worker.base_model import pick_device
    from worker.training.model import WarmBase

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    warm = WarmBase(pick_device())
    lines.say(Ready(device=str(warm.device)))
    while True:
        _answer(lines, lines.next_line(), warm)


def _answer(lines: Lines, line: bytes, warm: WarmBase) -> None:
    from worker.training.errors import server_error
    from worker.training.loop import train

    try:
        for word in train(TrainSpec.model_validate_json(line), warm):
            lines.say(word)
    except Exception:
        traceback.print_exc(file=sys.stderr)
        warm.drop()
        lines.say(server_error())


def _die_with_parent(parent: int) -> None:
    """End when the parent is gone, even if some other process still holds stdin's far end open.

    Not PR_SET_PDEATHSIG: it fires when the thread that started us ends, and Linux knows it alone.
    """
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)


if __name__ == "__main__":
    main()

"""A program that trains in forks of itself, so that a save can be killed a hundred times without imports.

One JSON line in: a TrainSpec. One line out: the fork's process id, once it waits, stopped, to be traced.
Another line out once it has ended: its exit status. Words of the trainer are dropped.
"""

from __future__ import annotations

import os
import signal
import sys

import torch

from worker.training.loop import train
from worker.training.model import WarmBase
from worker.training.words import Finished, TrainSpec


def main() -> None:
    """Fork for each line until there are no more."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        spec = TrainSpec.model_validate_json(line)
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
            words = list(train(spec, WarmBase(torch.device("cpu"))))
            os._exit(0 if isinstance(words[-1], Finished) else 3)
        os.waitpid(child, os.WUNTRACED)
        tell(str(child))
        tell(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))


def tell(word: str) -> None:
    """To whoever started this program."""
    sys.stdout.write(word + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

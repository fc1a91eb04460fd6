"""All processes of one trainer, found wherever they hide, and ended together.

Each inherits a mark in its environment, which neither `setsid` nor a double fork sheds; where the machine
has writable cgroups they share one as well. Knows nothing of training.

Run as a program this is the guard: it waits for the death of its parent, the worker, and ends what is left.
"""

from __future__ import annotations

import logging
import os
import secrets
import select
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

from worker.cgroup import Cgroup

log = logging.getLogger(__name__)
MARK = "LUTHIER_PROCESS_TREE"  # environment variable
_KILL_S = 2.0  # how long a killed process may take to leave; longer only where the kernel itself hangs
_GLANCE_S = 0.5  # how often the guard looks for its parent, besides listening for the end of the pipe


class ProcessTree:
    """The processes started with `environment` and taken in, and all that they started."""

    def __init__(self, mark: str, cgroup: Cgroup) -> None:
        self._mark = mark
        self._cgroup = cgroup
        self._guard: subprocess.Popen[bytes] | None = None

    @classmethod
    def make(cls, *, memory_bytes: int | None = None) -> ProcessTree:
        """An empty tree. `memory_bytes` limits it where cgroups can."""
        mark = secrets.token_hex(8)
        return cls(mark, Cgroup.make(mark, memory_bytes=memory_bytes))

    @property
    def environment(self) -> dict[str, str]:
        """What each process of the tree is started with."""
        return {MARK: self._mark}

    def take_in(self, pid: int) -> None:
        """Count a process that was just started as the tree's."""
        self._cgroup.take_in(pid)

    def members(self) -> list[psutil.Process]:
        """Those that live."""
        grouped = self._cgroup.members()
        found = []
        for pid in grouped.union(psutil.pids()):
            with suppress(psutil.Error, OSError):  # gone, or another user's
                process = psutil.Process(pid)
                ours = pid in grouped or process.environ().get(MARK) == self._mark
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def kill(self) -> bool:
        """End all of them; True once none is left, False where one does not die."""
        self._cgroup.kill()
        return self._end(keep=None)

    def end_strays(self, *, keep: int) -> bool:
        """End all but one; True once nothing else is left."""
        return self._end(keep=keep)

    def _end(self, *, keep: int | None) -> bool:
        deadline = time.monotonic() + _KILL_S
        while left := [process for process in self.members() if process.pid != keep]:
            if time.monotonic() > deadline:
                log.error("processes that cannot be ended: %s", ", ".join(str(one.pid) for one in left))
                return False
            for process in left:
                with suppress(psutil.Error):
                    process.suspend()  # else one that forks could outrun us where no cgroup forbids it
            for process in left:
                with suppress(psutil.Error):
                    process.kill()
            time.sleep(0.005)
        return True

    def guard(self) -> None:
        """Have a second process end the tree should this one die. No effect while it lives."""
        if self._guard is None or self._guard.poll() is not None:
            self._guard = subprocess.Popen(
                [sys.executable, "-P", "-m", "worker.process_tree", self._mark]
                + [str(folder) for folder in self._cgroup.folders],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
                start_new_session=True,
            )

    def close(self) -> None:
        """End the guard and remove the cgroup of a tree that is empty."""
        guard, self._guard = self._guard, None
        if guard is not None:
            guard.kill()
            guard.wait()
            assert guard.stdin is not None
            guard.stdin.close()
        self._cgroup.remove()


def main() -> None:
    """Wait until the parent is gone, then end its tree."""
    parent = os.getppid()
    mark, *folders = sys.argv[1:]
    tree = ProcessTree(mark, Cgroup([Path(folder) for folder in folders]))
    while os.getppid() == parent:
        if select.select([0], [], [], _GLANCE_S)[0]:
            break  # nobody ever writes: it is the end of the pipe
    tree.kill()
    tree.close()


if __name__ == "__main__":
    main()

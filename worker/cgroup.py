"""A control group of its own for one tree of processes, on machines that let us make one.

Version 2 is one folder, version 1 one for each controller. Whatever is not allowed is left out; without any
of it the tree is still found by its mark. Knows nothing of what runs inside.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

# Threads count too: a machine with 256 cores starts a few times that many for one training process.
MAX_PROCESSES = 4096
_BUSY_S = 2.0
_PREFIX = "luthier-"
_CONTROLLERS = {"memory", "pids"}
_ESCAPE = re.compile(r"\\([0-7]{3})")  # how /proc/self/mounts writes a space


class Cgroup:
    """The folders of one group. All of it may be missing; then it limits, finds and ends nothing."""

    def __init__(self, folders: list[Path], *, memory_bytes: int | None = None) -> None:
        self.folders = folders
        self._memory_bytes = memory_bytes

    @classmethod
    def make(cls, name: str, *, memory_bytes: int | None = None) -> Cgroup:
        """A group below this process's own. Empty ones beside it, left by the dead, are removed."""
        folders = [parent / f"{_PREFIX}{name}" for parent in _groups_of("self")]
        for left in (left for folder in folders for left in folder.parent.glob(f"{_PREFIX}*")):
            with suppress(OSError):  # in use; one that is only between two children is made again
                left.rmdir()
        group = cls(folders, memory_bytes=memory_bytes)
        group._appear()
        return group

    def take_in(self, pid: int) -> None:
        """Move a process into the group, before it has children."""
        self._appear()
        self._write("pids.max", str(MAX_PROCESSES))
        if self._memory_bytes is not None:
            self._write("memory.max", str(self._memory_bytes))
            self._write("memory.swap.max", "0")
            self._write("memory.limit_in_bytes", str(self._memory_bytes))
        self._write("cgroup.procs", str(pid))

    def members(self) -> set[int]:
        """The processes in the group."""
        found: set[int] = set()
        for folder in self.folders:
            with suppress(OSError):
                found.update(map(int, (folder / "cgroup.procs").read_text().split()))
        return found

    def kill(self) -> None:
        """Let nothing in it fork any more, and end all of it at once where the kernel knows how."""
        self._write("pids.max", "0")
        self._write("cgroup.kill", "1")

    def remove(self) -> None:
        """Take the folders away; what has just been killed may keep them busy for a moment."""
        for folder in self.folders:
            deadline = time.monotonic() + _BUSY_S
            while folder.exists() and time.monotonic() < deadline:
                try:
                    folder.rmdir()
                except OSError:
                    time.sleep(0.01)

    def _appear(self) -> None:
        for folder in self.folders:
            with suppress(OSError):
                folder.mkdir(exist_ok=True)

    def _write(self, name: str, value: str) -> None:
        for folder in self.folders:
            if (folder / name).exists():
                with suppress(OSError):
                    (folder / name).write_text(value)


class MemoryKills:
    """How many processes the kernel has ended for lack of memory, in the group that `pid` is in now.

    Where no group tells, it is the whole machine's count. It outlives the process, as its group does.
    """

    def __init__(self, pid: int) -> None:
        self._file = next(_memory_counters(pid), None)
        self._noted = self._count()

    def note(self) -> None:
        """Compare with this moment from now on."""
        self._noted = self._count()

    @property
    def any_since(self) -> bool:
        """Whether there was one since the moment noted. Never outside Linux."""
        return self._count() > self._noted

    def _count(self) -> int:
        return 0 if self._file is None else _counter(self._file)


def memory_limit(pid: int | str) -> int | None:
    """Bytes of memory that the process's groups allow it, the tightest of them; None: no group limits it."""
    limits: list[int] = []
    for group in _groups_of(pid):
        for folder in (group, *group.parents):
            for name in ("memory.max", "memory.limit_in_bytes"):
                with suppress(OSError, ValueError):  # not there, or the word "max"
                    limits.append(int((folder / name).read_text()))
    return min(limits, default=None)


def _counter(file: Path) -> int:
    with suppress(OSError, KeyError, ValueError):
        words = dict(line.split(" ", 1) for line in file.read_text().splitlines())
        return int(words["oom_kill"])
    return 0


def _memory_counters(pid: int) -> Iterator[Path]:
    for group in _groups_of(pid):
        for folder in (group, *group.parents):  # in version 2 perhaps only an outer group counts memory
            yield from (
                folder / name for name in ("memory.events", "memory.oom_control") if (folder / name).is_file()
            )
    if (machine := Path("/proc/vmstat")).is_file():
        yield machine


def _groups_of(pid: int | str) -> Iterator[Path]:
    """The folders of the process's groups that count or limit, as far as they are mounted here."""
    with suppress(OSError, ValueError):
        mounts = [line.split()[1:4] for line in Path("/proc/self/mounts").read_text().splitlines()]
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            _, controllers, inside = line.split(":", 2)
            wanted = _CONTROLLERS.intersection(controllers.split(","))
            for at, kind, options in mounts:
                first = wanted and kind == "cgroup" and wanted <= set(options.split(","))
                if first or (not controllers and kind == "cgroup2"):
                    root = Path(_ESCAPE.sub(lambda octal: chr(int(octal[1], 8)), at))
                    folder = root / inside.lstrip("/")
                    # Inside a container the mount may begin at the very group that has a longer name here.
                    yield folder if folder.is_dir() else root

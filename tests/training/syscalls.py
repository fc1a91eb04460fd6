"""Kills a process at each system call of one action in turn, by strace's fault injection.

A small server has the imports behind it and forks for each run; the fork waits until strace holds it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

SERVER = """
import ctypes, os, sys
from pathlib import Path
PR_SET_PTRACER, ANY = 0x59616D61, ctypes.c_ulong(-1)
namespace = {}
exec(sys.argv[1], namespace)
for line in sys.stdin:
    action, folder = line.split()
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        ctypes.CDLL(None).prctl(PR_SET_PTRACER, ANY, 0, 0, 0)
        os.close(write_end)
        os.read(read_end, 1)
        namespace[action](Path(folder))
        os._exit(0)
    os.close(read_end)
    print(pid, flush=True)
    sys.stdin.readline()
    os.close(write_end)
    print(os.waitpid(pid, 0)[1], flush=True)
"""
MOST = 1000  # calls of one name in one action: more would be a loop without end
CALL = re.compile(r"^(?:\d+\s+)?([a-z_0-9]+)\(", re.MULTILINE)


def why_not() -> str | None:
    """What keeps this machine from it."""
    if sys.platform != "linux":
        return "system calls are counted with strace, which is Linux's"
    return None if shutil.which("strace") else "strace is not installed"


class Killer:
    """Runs actions, functions of a folder that `program` defines, in processes that do not survive."""

    def __init__(self, program: str, log: Path) -> None:
        self._log = log
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER, program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def __enter__(self) -> Killer:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._server.kill()
        self._server.communicate()

    def kill_everywhere(
        self, action: str, prepare: Callable[[], Path], check: Callable[[Path, str], None]
    ) -> Counter[str]:
        """Kill `action` at each call of each name until it survives; how many points there were for each.

        `check` gets the folder that the dead left, and where it died.
        """
        names = sorted(self._calls(action, prepare()))
        points: Counter[str] = Counter()
        for name in names:
            for number in range(1, MOST):
                folder = prepare()
                status = self._run(action, folder, f"inject={name}:signal=KILL:when={number}", name)
                check(folder, f"{name} number {number}")
                if status == 0:
                    break
                assert status == 9, f"{action} ended with {status} at {name} number {number}"
                points[name] += 1
        return points

    def _calls(self, action: str, folder: Path) -> set[str]:
        assert self._run(action, folder, "signal=none", "all") == 0
        return set(CALL.findall(self._log.read_text())) - {"exit_group"}

    def _run(self, action: str, folder: Path, what: str, trace: str) -> int:
        pid = int(self._ask(f"{action} {folder}"))
        command = ["strace", "-f", "-p", str(pid), "-o", str(self._log), "-e", f"trace={trace}", "-e", what]
        with subprocess.Popen(command, stderr=subprocess.PIPE) as strace:
            self._wait_for(pid, strace)
            status = int(self._ask("go"))
            strace.communicate()
        return status

    def _wait_for(self, pid: int, strace: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + 10
        while "TracerPid:\t0\n" in (status := Path(f"/proc/{pid}/status").read_text()):
            if "State:\tZ" in status:  # killed at the call in which it waited for us
                return
            assert strace.poll() is None, strace.stderr and strace.stderr.read()
            assert time.monotonic() < deadline, "strace does not attach"
            time.sleep(0.001)

    def _ask(self, line: str) -> str:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(line, file=self._server.stdin, flush=True)
        return self._server.stdout.readline()

"""A short leash for one process: it ends when its holder closes standard input, or dies.

Run by path with `python -I -S`, so it is small and quick. The holder keeps the write end of a pipe; a
kernel closes that end even after `kill -9`, on Linux and macOS alike. Knows nothing of Luthier.

    leash.py [--signal TERM] [--grace 10] [--user NAME [--traverse]] -- PROGRAM ARGUMENT...
"""

from __future__ import annotations

import argparse
import ctypes
import os
import pwd
import select
import signal
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_KEEPCAPS = 8
PR_SET_SECUREBITS = 28
SECBIT_NO_SETUID_FIXUP = 4
PR_SET_CHILD_SUBREAPER = 36
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_RAISE = 2
CAP_VERSION_3 = 0x20080522
CAP_DAC_OVERRIDE = 1  # what root keeps in a container
CAP_DAC_READ_SEARCH = 2  # may enter any folder; the smaller right, where root has it
LINUX = sys.platform == "linux"
LINGER_S = 1.0  # what the process leaves behind gets this long to end by itself


def prctl(option: int, *arguments: int) -> bool:
    """Call Linux's prctl; False where it is refused."""
    padded = [ctypes.c_ulong(value) for value in (*arguments, 0, 0, 0, 0)[:4]]
    return bool(ctypes.CDLL(None, use_errno=True).prctl(option, *padded) == 0)


def keep_capability(bit: int) -> bool:
    """After leaving root: hold one capability through exec. False where the kernel refuses."""
    header = (ctypes.c_uint32 * 2)(CAP_VERSION_3, 0)
    mask = 1 << bit
    data = (ctypes.c_uint32 * 6)(mask, mask, mask, 0, 0, 0)
    if ctypes.CDLL(None, use_errno=True).capset(header, data) != 0:
        return False
    return prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, bit)


def become(user: str, *, traverse: bool) -> None:
    """Leave root for `user`. With `traverse`, keep only the right to enter folders closed to that user.

    PostgreSQL refuses uid 0. Opening root's folders to everybody instead would last; this right ends
    with the process.
    """
    account = pwd.getpwnam(user)
    if traverse and LINUX:
        prctl(PR_SET_KEEPCAPS, 1)
        prctl(PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP)  # else access(2) forgets the right for other users
    os.setgroups([])
    os.setgid(account.pw_gid)
    os.setuid(account.pw_uid)
    if traverse and LINUX and not keep_capability(CAP_DAC_READ_SEARCH):
        keep_capability(CAP_DAC_OVERRIDE)


def exec_child(options: argparse.Namespace, parent: int) -> None:
    """In the fork: own session, death signal, user, no terminal input; then the program. Never returns."""
    try:
        os.setsid()
        if options.user:
            become(options.user, traverse=options.traverse)
        if LINUX:  # after leaving root, which clears it
            prctl(PR_SET_PDEATHSIG, getattr(signal, f"SIG{options.death_signal}"))
        if os.getppid() != parent:
            os._exit(1)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.closerange(3, 256)  # what the leash inherited to hold, the program must not
        os.execvp(options.program[0], options.program)  # noqa: S606 - from a list, no shell
    except OSError as error:
        os.write(2, f"cannot start {options.program[0]}: {error.strerror}\n".encode())
    os._exit(127)


def reap(child: int) -> int | None:
    """Collect every process that ended; return the child's exit code when it is among them."""
    code = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return code
        if pid == 0:
            return code
        if pid == child:
            code = os.waitstatus_to_exitcode(status)


def send(child: int, number: int) -> None:
    """Signal the child's whole group; a group that is gone is no error."""
    try:
        os.killpg(child, number)
    except (ProcessLookupError, PermissionError):  # macOS says EPERM for a group of zombies
        return


def list_orphans() -> list[int]:
    """Processes that fell to the leash because their parent died (Linux; elsewhere none)."""
    if not LINUX:
        return []
    me = os.getpid()
    orphans = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent = (entry / "stat").read_text().rsplit(")", 1)[1].split()[1]
        except (OSError, IndexError):
            continue
        if int(parent) == me:
            orphans.append(int(entry.name))
    return orphans


def sweep(child: int) -> None:
    """End whatever the child left behind, in its group or adopted from it, and see it gone."""
    send(child, signal.SIGTERM)
    kill_at = time.monotonic() + LINGER_S
    while list_orphans() and time.monotonic() < kill_at:
        reap(child)
        time.sleep(0.02)
    send(child, signal.SIGKILL)
    while orphans := list_orphans():  # killing one hands us its children, so until none is left
        for pid in orphans:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
        reap(child)


def watch(child: int, wakeup: int, options: argparse.Namespace) -> int:
    """Wait for the child's end or the holder's; on the latter ask, wait, kill. Return the exit code."""
    stop_signal = getattr(signal, f"SIG{options.signal}")
    kill_at: float | None = None
    watched = [0, wakeup]
    while (code := reap(child)) is None:
        timeout = None if kill_at is None else max(0.0, kill_at - time.monotonic())
        ready, _, _ = select.select(watched, [], [], timeout)
        asked = 0 in ready and not os.read(0, 4096)
        if wakeup in ready:
            asked = any(byte != signal.SIGCHLD for byte in os.read(wakeup, 4096)) or asked
        if asked:
            watched = [wakeup]
        if asked and kill_at is None:
            os.kill(child, stop_signal)
            kill_at = time.monotonic() + options.grace
        elif kill_at is not None and time.monotonic() >= kill_at:
            send(child, signal.SIGKILL)
            kill_at = time.monotonic() + 1.0
    return code


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Run a program that ends when standard input closes.")
    parser.add_argument("--signal", default="TERM", help="how the program is asked to end")
    parser.add_argument("--death-signal", default="KILL", help="what it gets when the leash itself is killed")
    parser.add_argument("--grace", type=float, default=10.0, help="seconds from asking to killing")
    parser.add_argument("--user", help="run as this user; needs root")
    parser.add_argument("--traverse", action="store_true", help="let that user enter folders closed to it")
    parser.add_argument("program", nargs="+")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Run the program to its end and return its exit code (128 + n for signal n)."""
    options = parse(arguments)
    os.setpgid(0, 0)  # Ctrl-C in the terminal reaches the holder alone, which then ends us in order
    wakeup, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    if LINUX:
        prctl(PR_SET_CHILD_SUBREAPER, 1)
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        exec_child(options, parent)
    code = watch(child, wakeup, options)
    sweep(child)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""A leashed program ends with whoever holds the leash, however that one dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from app.cli.process_commands import leashed

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="the kernel offers it on Linux only")


def start(*argv: str, options: tuple[str, ...] = (), **popen: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(leashed(list(argv), options=options), stdin=subprocess.PIPE, **popen)  # type: ignore[call-overload, no-any-return]


def end(leash: subprocess.Popen[bytes]) -> int:
    assert leash.stdin is not None
    leash.stdin.close()
    return leash.wait(timeout=20)


def eventually(condition: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def read_pid(path: Path) -> int:
    assert eventually(lambda: path.exists() and path.read_text().endswith("\n"))
    return int(path.read_text())


def is_running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_the_exit_code_of_the_program_is_passed_on() -> None:
    with start("/bin/sh", "-c", "exit 7") as leash:
        assert leash.wait(timeout=20) == 7


def test_a_program_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with start("/no/such/program", stderr=subprocess.PIPE) as leash:
        _, text = leash.communicate(timeout=20)
    assert leash.returncode == 127
    assert b"/no/such/program: No such file" in text


def test_closing_the_leash_asks_the_program_with_the_signal_it_wants(tmp_path: Path) -> None:
    asked, pid = tmp_path / "asked", tmp_path / "pid"
    script = f"trap 'echo yes > {asked}; exit 5' INT; echo $$ > {pid}; while :; do sleep 0.05; done"
    with start("/bin/sh", "-c", script, options=("--signal", "INT")) as leash:
        read_pid(pid)
        assert end(leash) == 5
    assert asked.exists()


def test_a_program_that_does_not_listen_is_killed_after_its_grace(tmp_path: Path) -> None:
    script = f"trap '' TERM; echo $$ > {tmp_path}/pid; while :; do sleep 0.05; done"
    with start("/bin/sh", "-c", script, options=("--grace", "0.3")) as leash:
        pid = read_pid(tmp_path / "pid")
        assert end(leash) == 128 + signal.SIGKILL
    assert not is_running(pid)


def test_what_the_program_started_ends_with_it(tmp_path: Path) -> None:
    script = f"sleep 600 & echo $! > {tmp_path}/pid; wait"
    with start("/bin/sh", "-c", script, options=("--grace", "0.3")) as leash:
        pid = read_pid(tmp_path / "pid")
        end(leash)
    assert not is_running(pid)


@linux_only
def test_even_what_moved_to_a_session_of_its_own_ends(tmp_path: Path) -> None:
    script = f"setsid sh -c 'echo $$ > {tmp_path}/pid; trap \"\" TERM HUP; sleep 600; sleep 600' & sleep 600"
    with start("/bin/sh", "-c", script, options=("--grace", "0.3")) as leash:
        pid = read_pid(tmp_path / "pid")
        end(leash)
    assert not is_running(pid)


def test_kill_9_of_the_holder_ends_the_program(tmp_path: Path) -> None:
    inner = ["/bin/sh", "-c", f"echo $$ > {tmp_path}/pid; sleep 600"]
    holder = f"""
        import subprocess, time
        from app.cli.process_commands import leashed
        process = subprocess.Popen(leashed({inner!r}), stdin=subprocess.PIPE)
        time.sleep(600)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(holder)], cwd=Path(__file__).parents[2]
    ) as process:
        pid = read_pid(tmp_path / "pid")
        os.kill(process.pid, signal.SIGKILL)
        process.wait(timeout=20)
    assert eventually(lambda: not is_running(pid))


@linux_only
def test_kill_9_of_the_leash_itself_ends_the_program(tmp_path: Path) -> None:
    with start("/bin/sh", "-c", f"echo $$ > {tmp_path}/pid; sleep 600") as leash:
        pid = read_pid(tmp_path / "pid")
        leash.kill()
    assert eventually(lambda: not is_running(pid))


@linux_only
def test_the_program_does_not_get_what_the_leash_holds_open(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w") as held:
        argv = ["/bin/sh", "-c", "ls -l /proc/self/fd"]
        with start(*argv, pass_fds=(held.fileno(),), stdout=subprocess.PIPE) as leash:
            listing, _ = leash.communicate(timeout=20)
    assert b"/dev/null" in listing
    assert b"lock" not in listing

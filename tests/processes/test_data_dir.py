"""One `up` a data dir; a dead one never blocks the next."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from app.cli.data_dir import (
    ensure_password,
    explain_os_error,
    locked,
    prepare_data_dir,
    read_secret,
    write_secret,
)
from app.cli.errors import CommandError

HOLDER = """
    import os, subprocess, sys, time
    from pathlib import Path
    from app.cli.data_dir import locked
    from app.cli.process_commands import leashed
    script = f"echo $$ > {sys.argv[1]}/part; trap '' TERM; while :; do sleep 0.1; done"
    with locked(Path(sys.argv[1]), print) as lock:
        argv = leashed(["/bin/sh", "-c", script], options=("--grace", "1"))
        part = subprocess.Popen(argv, stdin=subprocess.PIPE, pass_fds=(lock,))
        while not Path(sys.argv[1], "part").exists():
            time.sleep(0.02)
        print("held", flush=True)
        time.sleep(600)
"""


def start_holder(folder: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDER), str(folder)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


def test_a_folder_in_use_is_refused_with_the_process_that_holds_it(tmp_path: Path) -> None:
    with start_holder(tmp_path) as holder:
        sentence = f"process {holder.pid}; stop that one"
        with pytest.raises(CommandError, match=sentence) as refused, locked(tmp_path, print):
            pass
        holder.kill()
    assert "\n" not in str(refused.value)


def test_after_kill_9_the_next_one_waits_for_the_parts_to_end(tmp_path: Path) -> None:
    said: list[str] = []
    with start_holder(tmp_path) as holder:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait(timeout=20)
        with locked(tmp_path, said.append):
            pass
    assert said == ["Waiting for the processes of an earlier run to end."]


def test_a_stale_lock_file_blocks_nobody(tmp_path: Path) -> None:
    (tmp_path / "up.lock").write_text(f"{os.getppid()} 0.0\n")
    with locked(tmp_path, print):
        words = (tmp_path / "up.lock").read_text().split()
        assert int(words[0]) == os.getpid()
    assert (tmp_path / "up.lock").read_text() == ""


def test_a_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    folder = tmp_path / "a folder" / "with spaces"
    assert prepare_data_dir(folder) == folder
    assert list(folder.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere root's PostgreSQL must get through")
def test_a_new_folder_is_closed_to_other_users_and_an_old_one_is_left_as_it_is(tmp_path: Path) -> None:
    assert stat.S_IMODE(prepare_data_dir(tmp_path / "new").stat().st_mode) == 0o700
    (tmp_path / "old").mkdir(mode=0o755)
    (tmp_path / "old").chmod(0o750)
    assert stat.S_IMODE(prepare_data_dir(tmp_path / "old").stat().st_mode) == 0o750


def test_a_file_in_the_place_of_the_folder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CommandError, match="is not a folder; give another --data-dir"):
        prepare_data_dir(tmp_path / "file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_missing_permission_is_one_sentence(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CommandError, match=r"You may not write to .*; correct its permissions"):
        prepare_data_dir(tmp_path / "data")


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (errno.ENOSPC, "is full; free some room"),
        (errno.EDQUOT, "is full; free some room"),
        (errno.EACCES, "You may not write"),
        (errno.EROFS, "read-only disk"),
        (errno.EIO, r"cannot be used \(Input/output error\)"),
    ],
)
def test_each_failure_of_the_disk_has_its_cure(number: int, sentence: str, tmp_path: Path) -> None:
    text = explain_os_error(OSError(number, os.strerror(number)), tmp_path)
    with pytest.raises(CommandError, match=sentence):
        raise CommandError(text)
    assert "--data-dir" in text


def test_a_disk_without_room_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.cli.data_dir.LEAST_FREE_BYTES", 2**62)
    with pytest.raises(CommandError, match=r"MB left, .* are needed; free some room"):
        prepare_data_dir(tmp_path)


def test_secrets_are_for_their_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "secrets" / "password"
    password = ensure_password(path)
    assert ensure_password(path) == password
    assert len(password) >= 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_secret_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "secrets" / "key"
    assert read_secret(path) is None
    write_secret(path, "first")
    write_secret(path, "second")
    assert read_secret(path) == "second"
    assert [entry.name for entry in path.parent.iterdir()] == ["key"]

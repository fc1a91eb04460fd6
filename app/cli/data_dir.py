"""The folder an installation lives in: its lock, its secrets, its room. Knows no server and no process."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from app.cli.errors import CommandError

LEAST_FREE_BYTES = 300 * 10**6
LEFTOVERS_TIMEOUT_S = 20.0
# PostgreSQL leaves root, and only Linux lets it take along the right to enter closed folders (leash.py).
CLOSED = 0o711 if os.geteuid() == 0 and sys.platform != "linux" else 0o700


def prepare_data_dir(path: Path) -> Path:
    """The absolute folder, proven writable and with some room left; made if absent, closed to other users."""
    folder = path.expanduser().absolute()
    try:
        folder.mkdir(mode=CLOSED, parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise CommandError(explain_os_error(error, folder)) from error
    free = shutil.disk_usage(folder).free
    if free < LEAST_FREE_BYTES:
        raise CommandError(
            f"The disk of {folder} has {free // 10**6} MB left, {LEAST_FREE_BYTES // 10**6} MB are needed; "
            "free some room or give another --data-dir."
        )
    return folder


def explain_os_error(error: OSError, path: Path) -> str:
    """One sentence for a folder or file that cannot be used, with the cure."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk of {path} is full; free some room or give another --data-dir."
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"You may not write to {path}; correct its permissions or give another --data-dir."
    if error.errno == errno.EROFS:
        return f"{path} lies on a read-only disk; give another --data-dir."
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return f"{path} is not a folder; give another --data-dir."
    return f"{path} cannot be used ({error.strerror}); give another --data-dir."


@contextmanager
def locked(folder: Path, echo: Callable[[str], None]) -> Iterator[int]:
    """Hold the folder for this process; yields the lock's descriptor, which every part inherits.

    The kernel frees the lock when its last holder ends, so a stale file blocks nobody, and a lock held by
    the parts of a killed run tells us to wait for their end.
    """
    try:
        file = (folder / "up.lock").open("a+")
    except OSError as error:
        raise CommandError(explain_os_error(error, folder / "up.lock")) from error
    with file:
        _take(file.fileno(), folder, echo)
        file.seek(0)
        file.truncate()
        file.write(f"{os.getpid()} {psutil.Process().create_time()}\n")
        file.flush()
        try:
            yield file.fileno()
        finally:
            file.seek(0)
            file.truncate()


def _take(descriptor: int, folder: Path, echo: Callable[[str], None]) -> None:
    deadline = time.monotonic() + LEFTOVERS_TIMEOUT_S
    said = False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            holder = find_holder(folder)
        if holder is not None:
            raise CommandError(
                f"{folder} is in use by another `luthier up`, process {holder}; "
                "stop that one or give another --data-dir."
            )
        if time.monotonic() > deadline:
            raise CommandError(
                f"{folder} is held by processes of an earlier run that do not end; "
                f"`lsof {folder}/up.lock` names them."
            )
        if not said:
            echo("Waiting for the processes of an earlier run to end.")
            said = True
        time.sleep(0.1)


def find_holder(folder: Path) -> int | None:
    """The process id of the `luthier up` that holds the folder; None when it is dead."""
    deadline = time.monotonic() + 1.0
    while not (words := (folder / "up.lock").read_text().split()):
        if time.monotonic() > deadline:
            return None
        time.sleep(0.02)  # the holder is between taking the lock and writing its id
    pid, created = int(words[0]), float(words[1])
    try:
        same = abs(psutil.Process(pid).create_time() - created) < 1.0
    except psutil.NoSuchProcess:
        return None
    return pid if same else None


def read_secret(path: Path) -> str | None:
    """What `write_secret` wrote, or None."""
    return path.read_text().strip() if path.exists() else None


def write_secret(path: Path, secret: str) -> None:
    """Keep a secret in a file only its owner can read; whole or not at all."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secret + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def ensure_password(path: Path) -> str:
    """The password kept in `path`, made at the first call."""
    password = read_secret(path)
    if password is None:
        password = secrets.token_urlsafe(32)
        write_secret(path, password)
    return password

"""Bytes in, bytes out, below one folder. Files appear whole or not at all; keys never come from users.

A key is a relative path made by this service. Writing goes to `tmp/`, is synced, then renamed.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from app.core.errors import StorageFull
from app.core.ids import random_name

log = logging.getLogger(__name__)
_PLACES = ("tmp", "files", "weights", "attempts")
_KEY = re.compile(r"[a-z]+/[A-Za-z0-9_-]+")


class PendingFile:
    """A file being written. Ends in `publish`, which makes it visible, or `discard`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("xb")
        self._hash = hashlib.sha256()
        self.size_bytes = 0

    def write(self, data: bytes) -> None:
        """Append bytes; raises StorageFull when the disk has no room."""
        with _disk_full_as_error():
            self._file.write(data)
        self._hash.update(data)
        self.size_bytes += len(data)

    @property
    def sha256(self) -> str:
        """Hex digest of all bytes written so far."""
        return self._hash.hexdigest()

    def publish(self, target: Path) -> None:
        """Sync the bytes and give them their name."""
        with _disk_full_as_error():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            rename_durably(self._path, target)

    def discard(self) -> None:
        """Forget the bytes. Safe to call after either end."""
        with suppress(OSError):
            self._file.close()
        self._path.unlink(missing_ok=True)


class Storage:
    """Files and folders of bytes below one root on this machine."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in _PLACES:
            (root / name).mkdir(parents=True, exist_ok=True)

    def is_there(self) -> bool:
        """Whether its folders are; while their disk is away nothing can be said of what they hold."""
        return all((self.root / name).is_dir() for name in _PLACES)

    def begin(self) -> PendingFile:
        """A new file, invisible until it is published."""
        with _disk_full_as_error():
            return PendingFile(self.root / "tmp" / random_name(24))

    def publish(self, pending: PendingFile, key: str) -> None:
        """Give a pending file its key."""
        pending.publish(self.path(key))

    def publish_dir(self, folder: Path, key: str) -> None:
        """Move a whole folder, already synced by its writer, to its key."""
        target = self.path(key)
        if not target.exists():
            with _disk_full_as_error():
                rename_durably(folder, target)

    def path(self, key: str) -> Path:
        """Where the bytes of a key lie."""
        if not _KEY.fullmatch(key):
            raise ValueError(f"not a storage key: {key!r}")
        return self.root / key

    def open(self, key: str) -> BinaryIO:
        """The bytes of a file."""
        return self.path(key).open("rb")

    def names(self, place: str) -> list[str]:
        """What lies in one of the top folders; a key is `place/name`."""
        return [path.name for path in (self.root / place).iterdir()]

    def age_s(self, key: str) -> float:
        """Seconds since a key was published or last renamed; 0 when it is gone."""
        try:
            return time.time() - self.path(key).stat().st_ctime
        except FileNotFoundError:
            return 0.0

    def delete(self, key: str, *, part: str = "") -> bool:
        """Remove a file or folder, or one `part` of a folder; False when some of it is still there."""
        path = self.path(key) / part if part else self.path(key)
        try:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s cannot be removed: %s", key, error.strerror)
        return not path.exists()

    def drop_stale(self, *, age_s: float) -> int:
        """Remove unpublished files nobody has written to for so long: their writer is gone."""
        count = 0
        for path in (self.root / "tmp").iterdir():
            with suppress(FileNotFoundError):  # published or discarded this moment
                if time.time() - path.stat().st_mtime > age_s:
                    path.unlink()
                    count += 1
        return count


class _disk_full_as_error:  # noqa: N801 - reads as a verb at its call sites
    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull(
                "The service's storage is full. Delete files you no longer need, "
                "or ask the operator for room.",
                code="storage_full",
            ) from error


def rename_durably(source: Path, target: Path) -> None:
    """Rename, then sync the folder, so that the new name survives a power cut."""
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)

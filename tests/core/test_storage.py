"""Bytes appear whole or not at all."""

from __future__ import annotations

import gc
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from app.core.errors import StorageFull
from app.core.storage import PendingFile, Storage


def everything(storage: Storage) -> list[str]:
    return sorted(str(path.relative_to(storage.root)) for path in storage.root.rglob("*") if path.is_file())


def test_a_published_file_is_whole_and_leaves_nothing_behind(storage: Storage) -> None:
    pending = storage.begin()
    for part in (b"ab", b"", b"c" * 100_000):
        pending.write(part)
    assert [name for name in everything(storage) if not name.startswith("tmp/")] == []
    storage.publish(pending, "files/file-a_1")
    pending.discard()
    assert everything(storage) == ["files/file-a_1"]
    assert pending.size_bytes == 100_002
    with storage.open("files/file-a_1") as file:
        assert hashlib.sha256(file.read()).hexdigest() == pending.sha256


def test_a_discarded_file_was_never_there(storage: Storage) -> None:
    pending = storage.begin()
    pending.write(b"x")
    pending.discard()
    pending.discard()
    assert everything(storage) == []


@pytest.mark.parametrize(
    "key",
    [
        "",
        "a",
        "/etc/passwd",
        "files/",
        "files/..",
        "files/../x",
        "../x",
        "files/a/b",
        "files/a\0",
        "files/a\n",
        "Files/a",
        "files/é",
        "files/a.b",
    ],
)
def test_a_key_that_is_not_one_of_ours_is_refused(storage: Storage, key: str) -> None:
    for action in (storage.path, storage.open, storage.delete):
        with pytest.raises(ValueError, match="not a storage key"):
            action(key)


def test_a_folder_is_published_once(storage: Storage, tmp_path: Path) -> None:
    for text in ("first", "second"):
        folder = tmp_path / text
        folder.mkdir()
        (folder / "a").write_text(text)
        storage.publish_dir(folder, "weights/w")
    assert (storage.path("weights/w") / "a").read_text() == "first"
    storage.delete("weights/w")
    storage.delete("weights/w")
    assert everything(storage) == []


def test_uploads_whose_writer_is_gone_are_dropped_and_living_ones_kept(storage: Storage) -> None:
    old = storage.begin()
    [path] = (storage.root / "tmp").iterdir()
    os.utime(path, (0, 0))
    living = storage.begin()
    living.write(b"y")
    assert storage.drop_stale(age_s=3600) == 1
    assert not path.exists()
    old.discard()
    storage.publish(living, "files/a")


def test_a_full_disk_is_an_error_of_its_own(tmp_path: Path) -> None:
    """/dev/full answers every write with ENOSPC."""
    link = tmp_path / "full"
    link.symlink_to("/dev/full")

    class Full(PendingFile):
        def __init__(self) -> None:
            super().__init__(tmp_path / "other")
            self._file.close()
            self._file = link.open("wb")

    pending = Full()
    with pytest.raises(StorageFull) as caught:
        pending.write(b"x" * 1_000_000)
    assert caught.value.code == "storage_full"
    pending.discard()
    assert not (tmp_path / "other").exists()
    late = Full()
    late.write(b"x")
    with pytest.raises(StorageFull):
        late.publish(tmp_path / "target")
    late.discard()
    assert not (tmp_path / "target").exists()


def test_a_writer_killed_at_any_moment_leaves_no_file_under_its_key(storage: Storage) -> None:
    script = (
        "import os, sys; from pathlib import Path; from app.core.storage import Storage\n"
        "s = Storage(Path(sys.argv[1])); p = s.begin(); p.write(b'x' * 3_000_000); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(storage.root)], check=False, timeout=60)
    assert done.returncode == -9
    assert [name for name in everything(storage) if not name.startswith("tmp/")] == []
    assert storage.drop_stale(age_s=-1) == 1


def test_open_files_are_closed_by_either_end(storage: Storage) -> None:
    gc.collect()  # what earlier tests left open goes now, not in between
    before = len(list(Path("/dev/fd").iterdir()))
    for number in range(20):
        pending = storage.begin()
        pending.write(b"x")
        if number % 2:
            storage.publish(pending, f"files/f{number}")
        else:
            pending.discard()
    assert len(list(Path("/dev/fd").iterdir())) == before

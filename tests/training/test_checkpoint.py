"""A checkpoint folder is whole or absent."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from app.core.manifest import MANIFEST
from worker.training.checkpoint import write_checkpoint


def fill(dir: Path) -> None:
    (dir / "a.bin").write_bytes(b"weights")
    (dir / "sub").mkdir()
    (dir / "sub" / "b.json").write_text("{}")


def test_the_manifest_holds_size_and_digest_of_every_file(tmp_path: Path) -> None:
    dir = write_checkpoint(tmp_path / "out", 7, fill)
    assert dir == tmp_path / "out" / "step-7"
    manifest = json.loads((dir / MANIFEST).read_text())
    assert manifest["step"] == 7
    assert manifest["files"] == {
        "a.bin": {"sha256": hashlib.sha256(b"weights").hexdigest(), "size_bytes": 7},
        "sub/b.json": {"sha256": hashlib.sha256(b"{}").hexdigest(), "size_bytes": 2},
    }


def test_a_death_while_writing_leaves_no_folder_under_the_final_name_and_the_next_try_succeeds(
    tmp_path: Path,
) -> None:
    def die(dir: Path) -> None:
        (dir / "half.bin").write_bytes(b"we")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(tmp_path, 7, die)
    assert not (tmp_path / "step-7").exists()
    dir = write_checkpoint(tmp_path, 7, fill)
    assert sorted(path.name for path in dir.iterdir()) == ["a.bin", MANIFEST, "sub"]
    assert [path.name for path in tmp_path.iterdir()] == ["step-7"]

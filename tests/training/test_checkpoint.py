"""A checkpoint folder is whole or absent, and what is not whole is known."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from app.core.manifest import MANIFEST, TRAINING_STATE, DamagedError, verify
from tests.training.conftest import result
from worker.training.checkpoint import write_checkpoint
from worker.training.resume import Progress, find_resume

FINGERPRINT = {"seed": 1}
FLIPS = 500


def fill(dir: Path) -> None:
    (dir / "a.bin").write_bytes(b"weights")
    (dir / "sub").mkdir()
    (dir / "sub" / "b.json").write_text("{}")


def fill_resumable(step: int) -> Callable[[Path], None]:
    """Fills a folder as the trainer does, with few bytes."""

    def fill(dir: Path) -> None:
        (dir / "adapter_model.safetensors").write_bytes(bytes(range(200)) + step.to_bytes(2, "big"))
        (dir / "adapter_config.json").write_text("{}\n")
        (dir / TRAINING_STATE).mkdir()
        (dir / TRAINING_STATE / "optimizer.safetensors").write_bytes(bytes(300))
        Progress(step=step, tokens_seen=7).write(dir, FINGERPRINT)

    return fill


def test_the_manifest_holds_size_and_digest_of_every_file(tmp_path: Path) -> None:
    dir = write_checkpoint(tmp_path / "out", 7, fill)
    assert dir == tmp_path / "out" / "step-7"
    manifest = json.loads((dir / MANIFEST).read_text())
    assert manifest["step"] == 7
    assert manifest["files"] == {
        "a.bin": {"sha256": hashlib.sha256(b"weights").hexdigest(), "size_bytes": 7},
        "sub/b.json": {"sha256": hashlib.sha256(b"{}").hexdigest(), "size_bytes": 2},
    }
    assert verify(dir) == manifest


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


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two whole checkpoints, the newer first."""
    older, newer = (write_checkpoint(tmp_path, step, fill_resumable(step)) for step in (3, 6))
    return newer, older


def resumed_step(pair: tuple[Path, Path]) -> int:
    found = result(find_resume([str(folder) for folder in pair], FINGERPRINT))
    return 0 if found is None else found.progress.step


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_flipped_byte_anywhere_is_seen_and_the_checkpoint_before_it_used(pair: tuple[Path, Path]) -> None:
    newer, _ = pair
    assert resumed_step(pair) == 6
    places = [(file, at) for file in files_of(newer) for at in range(file.stat().st_size)]
    rng = random.Random(36)
    for file, at in rng.sample(places, FLIPS):
        whole = file.read_bytes()
        file.write_bytes(whole[:at] + bytes([whole[at] ^ rng.randrange(1, 256)]) + whole[at + 1 :])
        with pytest.raises(DamagedError):
            verify(newer, with_state=True)
        assert resumed_step(pair) == 3, (file.name, at)
        file.write_bytes(whole)
    assert resumed_step(pair) == 6


def test_a_file_cut_short_grown_or_gone_is_seen(pair: tuple[Path, Path]) -> None:
    newer, _ = pair
    for file in files_of(newer):
        whole = file.read_bytes()
        for damaged in (b"", whole[: len(whole) // 2], whole[:-1], whole + b"\n"):
            file.write_bytes(damaged)
            assert resumed_step(pair) == 3, (file.name, len(damaged))
        file.unlink()
        assert resumed_step(pair) == 3, file.name
        file.write_bytes(whole)
    assert resumed_step(pair) == 6


def test_without_its_training_state_a_checkpoint_serves_but_nothing_goes_on_from_it(
    pair: tuple[Path, Path],
) -> None:
    newer, older = pair
    shutil.rmtree(newer / TRAINING_STATE)
    verify(newer)
    assert resumed_step(pair) == 3
    shutil.rmtree(older)
    assert resumed_step(pair) == 0


@pytest.mark.parametrize(
    "content", ["[]", "null", "{}", '{"files": {}}', '{"files": {"../x": {}}}', "[" * 10_000]
)
def test_a_foreign_manifest_is_damage_not_an_error(pair: tuple[Path, Path], content: str) -> None:
    (pair[0] / MANIFEST).write_text(content)
    with pytest.raises(DamagedError, match="manifest cannot be read"):
        verify(pair[0])


def test_a_save_whose_sync_fails_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fsync of a save in its turn, as of a disk with a bad block."""
    sync, calls = os.fsync, 0

    def failing(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls == bad:
            raise OSError(5, "Input/output error")
        sync(handle)

    monkeypatch.setattr(os, "fsync", failing)
    bad = 0
    write_checkpoint(tmp_path / "whole", 3, fill_resumable(3))
    for bad in range(1, calls):  # the last is after the rename: the folder is whole by then
        calls = 0
        with pytest.raises(OSError, match="Input/output"):
            write_checkpoint(tmp_path / str(bad), 3, fill_resumable(3))
        assert not (tmp_path / str(bad) / "step-3").exists()

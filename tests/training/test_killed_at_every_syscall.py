"""Whatever call into the system is a process's last, what it was saving is whole or absent."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest

from app.core.manifest import DamagedError, verify
from app.core.storage import Storage
from tests.training.conftest import result
from tests.training.syscalls import Killer, why_not
from worker.training.checkpoint import write_checkpoint
from worker.training.resume import Progress, find_resume

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
FINGERPRINT = {"seed": 1}
DATA = b"line\n" * 100
PROGRAM = f"""
from app.core.manifest import TRAINING_STATE
from app.core.storage import Storage
from worker.training.checkpoint import write_checkpoint
from worker.training.resume import Progress

def fill(dir):
    (dir / "adapter_model.safetensors").write_bytes(b"weights")
    (dir / TRAINING_STATE).mkdir()
    (dir / TRAINING_STATE / "optimizer.safetensors").write_bytes(b"moments")
    Progress(step=6).write(dir, {FINGERPRINT!r})

def save(folder):
    write_checkpoint(folder, 6, fill)

def publish(folder):
    storage = Storage(folder)
    pending = storage.begin()
    pending.write({DATA!r})
    storage.publish(pending, "files/abc")

def publish_dir(folder):
    Storage(folder).publish_dir(folder / "attempts" / "j-1" / "step-6", "weights/j-1-6")
"""


def fill(step: int) -> Callable[[Path], None]:
    def fill(dir: Path) -> None:
        (dir / "training_state").mkdir()
        Progress(step=step).write(dir, FINGERPRINT)

    return fill


@pytest.fixture
def killer(tmp_path: Path) -> Iterator[Killer]:
    with Killer(PROGRAM, tmp_path / "log") as killer:
        yield killer


@pytest.fixture
def numbers() -> Iterator[int]:
    return count()


def test_a_checkpoint_is_whole_or_absent_and_the_run_goes_on_from_the_newest(
    killer: Killer, tmp_path: Path, numbers: Iterator[int]
) -> None:
    def prepare() -> Path:
        folder = tmp_path / f"attempt-{next(numbers)}"
        write_checkpoint(folder, 3, fill(3))
        return folder

    outcomes = set()

    def check(folder: Path, where: str) -> None:
        kept = sorted(folder.glob("step-*"), reverse=True)
        for whole in kept:
            verify(whole, with_state=True)  # never a mix
        resume = result(find_resume([str(one) for one in kept], FINGERPRINT))
        assert resume is not None, where
        outcomes.add(resume.progress.step)
        if resume.progress.step == 3:  # so step 6 is trained and saved again
            write_checkpoint(folder, 6, fill(6))
        assert sorted(path.name for path in folder.iterdir()) == ["step-3", "step-6"], where
        verify(folder / "step-6", with_state=True)
        shutil.rmtree(folder)

    points = killer.kill_everywhere("save", prepare, check)
    assert outcomes == {3, 6}
    assert points["fsync"] == 3 + 1 + 2 + 1  # files, manifest, folders, the parent
    assert points["rename"] == 1
    assert points.total() > 60
    print(f"kill at every call of a save: {points.total()} points, {dict(points)}")  # noqa: T201


def test_a_file_is_published_whole_or_not_at_all(
    killer: Killer, tmp_path: Path, numbers: Iterator[int]
) -> None:
    def prepare() -> Path:
        return Storage(tmp_path / f"storage-{next(numbers)}").root

    outcomes = set()

    def check(folder: Path, where: str) -> None:
        storage = Storage(folder)
        target = storage.path("files/abc")
        outcomes.add(target.exists())
        assert not target.exists() or target.read_bytes() == DATA, where
        storage.drop_stale(age_s=-1)
        assert list((folder / "tmp").iterdir()) == [], where
        shutil.rmtree(folder)

    points = killer.kill_everywhere("publish", prepare, check)
    assert outcomes == {True, False}
    assert points["fsync"] == 2
    assert points.total() > 15
    print(f"kill at every call of a file's publish: {points.total()} points, {dict(points)}")  # noqa: T201


def test_a_checkpoint_is_moved_whole_or_stays_where_it_is(
    killer: Killer, tmp_path: Path, numbers: Iterator[int]
) -> None:
    def prepare() -> Path:
        root = Storage(tmp_path / f"storage-{next(numbers)}").root
        write_checkpoint(root / "attempts" / "j-1", 6, fill(6))
        return root

    outcomes = set()

    def check(folder: Path, where: str) -> None:
        places = [folder / "attempts" / "j-1" / "step-6", folder / "weights" / "j-1-6"]
        whole = []
        for place in places:
            with suppress(DamagedError):
                verify(place, with_state=True)
                whole.append(place.name)
        assert len(whole) == 1, where
        assert sum(place.exists() for place in places) == 1, where
        outcomes.add(whole[0])
        shutil.rmtree(folder)

    points = killer.kill_everywhere("publish_dir", prepare, check)
    assert outcomes == {"step-6", "j-1-6"}
    print(f"kill at every call of a checkpoint's publish: {points.total()} points, {dict(points)}")  # noqa: T201

"""Where a run goes on: the newest whole checkpoint that belongs to it. Knows files and numbers, no torch."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from app.core.manifest import TRAINING_STATE, DamagedError, verify
from worker.training.words import Log

PROGRESS = f"{TRAINING_STATE}/progress.json"
Fingerprint = Mapping[str, str | int]  # what two attempts must have in common to be one run


@dataclass(slots=True)
class Progress:
    """How far a run has come. Epoch and position within it follow from the step."""

    step: int = 0  # steps that are done
    tokens_seen: int = 0
    elapsed_s: float = 0.0  # of training, without pauses
    max_tokens: int | None = None  # of one pass
    shrinks: int = 0  # how often it was
    base_full_valid_loss: float | None = None  # before the first step; None: not measured, or not finite
    full_valid_loss: float | None = None  # at the end of the last whole epoch
    best_full_valid_loss: float | None = None  # of all epochs
    best_step: int | None = None  # the epoch's end it was measured at

    def write(self, folder: Path, fingerprint: Fingerprint) -> None:
        """Keep it in a checkpoint folder."""
        text = json.dumps({"progress": asdict(self), "fingerprint": fingerprint}, indent=2, sort_keys=True)
        (folder / PROGRESS).write_text(text + "\n")


@dataclass(frozen=True, slots=True)
class Resume:
    """A whole checkpoint of this run."""

    folder: Path
    progress: Progress


def find_resume(folders: Sequence[str], fingerprint: Fingerprint) -> Generator[Log, None, Resume | None]:
    """The first of `folders` that is whole and of this run; says which it passed over, and why."""
    for folder in map(Path, folders):
        try:
            verify(folder, with_state=True)
            return Resume(folder, _read(folder, fingerprint))
        except DamagedError as error:
            what = f"The checkpoint of step {step_of(folder)} cannot be used: {error}."
        yield Log(level="warn", message=what)
    if folders:
        yield Log(level="warn", message="No checkpoint can be used; training starts from the beginning.")
    return None


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint folder."""
    digits = folder.name.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else 0


def _read(folder: Path, fingerprint: Fingerprint) -> Progress:
    try:
        state = json.loads((folder / PROGRESS).read_bytes())
        progress = Progress(**state["progress"])
        theirs = state["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        raise DamagedError("its training state is of another version") from None
    if theirs != fingerprint:
        different = sorted(name for name in fingerprint if theirs.get(name) != fingerprint[name])
        raise DamagedError(f"it was made with another {', '.join(different)}")
    return progress

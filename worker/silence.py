"""How long a trainer has said nothing, and how long it may: each section of its work has its own limit.

The second of two signals. That the parent lives says nothing about a step that hangs; that steps come says
nothing about a parent cut off from the database.
"""

from __future__ import annotations

import time

from app.core.settings import Settings
from worker.training.words import Baseline, CheckpointReady, Section, Started, StepDone, TrainWord, Working

_DOING = {
    Section.SETUP: "reading files and models",
    Section.STEP: "training",
    Section.VALIDATION: "validating",
    Section.CHECKPOINT: "writing a checkpoint",
}


class Silence:
    """Starts with `begin`; every word breaks it."""

    def __init__(self, settings: Settings) -> None:
        self._limits = {
            Section.SETUP: settings.setup_limit_s,
            Section.STEP: settings.step_limit_s,
            Section.VALIDATION: settings.validation_limit_s,
            Section.CHECKPOINT: settings.checkpoint_limit_s,
        }
        self._section, self._step = Section.SETUP, 0
        self._since = time.monotonic()

    def begin(self) -> None:
        """The trainer has been given its work."""
        self._since = time.monotonic()

    def broken_by(self, word: TrainWord) -> None:
        """Something moves, and this is where."""
        self._since = time.monotonic()
        match word:
            case Working():
                self._section, self._step = word.section, word.step
            case Started():
                self._section, self._step = Section.STEP, word.step + 1
            case Baseline() | StepDone() | CheckpointReady():
                self._section, self._step = Section.STEP, word.metrics.step + 1
            case _:
                pass

    def is_too_long(self) -> str | None:
        """What to tell the user once the section's limit has passed."""
        limit_s = self._limits[self._section]
        if time.monotonic() - self._since <= limit_s:
            return None
        place = f"section {self._section}" + (f", step {self._step}" if self._step else "")
        return (
            f"The trainer made no progress for {limit_s:g} s while {_DOING[self._section]} ({place}), "
            "so it was ended."
        )

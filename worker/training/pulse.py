"""Signs of life from long work that has no words of its own. Knows nothing of the work."""

from __future__ import annotations

import time
from collections.abc import Iterator

from worker.training.words import Section, Working

EVERY_S = 2.0  # far below any patience the parent may have, far above the cost of a line


class Pulse:
    """Made when one section of work begins, asked again and again while it goes on."""

    def __init__(self, section: Section, step: int = 0) -> None:
        self._word = Working(section=section, step=step)
        self._said_at = time.monotonic()

    def begin(self) -> Iterator[Working]:
        """The word that the section begins."""
        self._said_at = time.monotonic()
        yield self._word

    def beat(self) -> Iterator[Working]:
        """One word where the last is EVERY_S seconds old, else none."""
        now = time.monotonic()
        if now - self._said_at >= EVERY_S:
            self._said_at = now
            yield self._word

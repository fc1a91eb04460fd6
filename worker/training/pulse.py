"""Signs of life from long work that has no words of its own. Knows nothing of the work."""

from __future__ import annotations

import time
from collections.abc import Iterator

from worker.training.words import Working

EVERY_S = 5.0  # far below any patience the parent may have, far above the cost of a line


class Pulse:
    """Made when one section of work begins, asked again and again while it goes on."""

    def __init__(self, section: str) -> None:
        self._section = section
        self._said_at = time.monotonic()

    def beat(self) -> Iterator[Working]:
        """One word where the last is EVERY_S seconds old, else none."""
        now = time.monotonic()
        if now - self._said_at >= EVERY_S:
            self._said_at = now
            yield Working(section=self._section)

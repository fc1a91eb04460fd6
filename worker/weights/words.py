"""What fetching weights says: how far it is, or why it cannot go on."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_REPORT_EVERY_S = 0.2


class WeightsError(Exception):
    """Weights cannot be had. The text is one sentence for the operator, with the cure."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one step is. `total_bytes` None: not known."""

    step: str  # waiting, downloading, checking, converting, done
    done_bytes: int = 0
    total_bytes: int | None = None


OnProgress = Callable[[Progress], None]


@contextmanager
def reporting_size(folder: Path, on_progress: OnProgress, total_bytes: int | None) -> Iterator[None]:
    """While the block runs, report what lies in `folder`: a downloader's bytes, whatever it is."""
    finished = threading.Event()

    def report() -> None:
        while not finished.wait(_REPORT_EVERY_S):
            on_progress(Progress("downloading", size_of(folder), total_bytes))

    reporter = threading.Thread(target=report, daemon=True)
    reporter.start()
    try:
        yield
    finally:
        finished.set()
        reporter.join()


def size_of(folder: Path) -> int:
    """Bytes of all files below `folder`; files that vanish meanwhile count nothing."""
    total = 0
    for place, _, names in os.walk(folder):  # passes over folders that vanish
        for name in names:
            with suppress(OSError):
                total += Path(place, name).stat().st_size
    return total

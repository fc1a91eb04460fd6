"""Random faults for as long as asked, and what memory and descriptors of lasting processes did meanwhile."""

from __future__ import annotations

import random
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from statistics import fmean

import psutil

from tests.chaos.matrix import ALL
from tests.chaos.run import Result, say, try_faults
from tests.chaos.service import Service

# Faults that end the API or inference themselves are left out, so that those live to be measured.
LEFT_OUT = {"F04", "F12", "F13", "F14", "F36", "F43", "F44"}
WATCHED = ("api", "control", "inference", "training-a", "training-b")
WARM_UP = 0.2  # of the samples: caches fill, pools open
GROWTH, GROWTH_BYTES, GROWTH_FDS = 0.05, 16 * 2**20, 8  # the last quarter may lie above the first by so much
EVERY_S = 2.0
LEAST_SAMPLES = 20


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at one process."""

    at: float
    rss_bytes: int
    fds: int


class Watch:
    """Samples every process of the service until the block ends, a series for each process id."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._over = threading.Event()
        self.series: dict[tuple[str, int], list[Sample]] = {}
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(EVERY_S):
            for name in WATCHED:
                with suppress(psutil.Error, AssertionError):
                    process = psutil.Process(self._service.pid_of(name))
                    sample = Sample(time.monotonic(), process.memory_info().rss, process.num_fds())
                    self.series.setdefault((name, process.pid), []).append(sample)


def soak(service: Service, *, seconds: float, seed: int) -> tuple[list[Result], bool]:
    """Faults by chance until the time is over; all results, and whether everything stayed flat."""
    chance = random.Random(f"soak {seed}")
    names = sorted(set(ALL) - LEFT_OUT)
    results: list[Result] = []
    try_faults(service, [ALL["F40"]], seed=seed, n=1, whole=False)  # opens every pool of the API
    until = time.monotonic() + seconds
    with Watch(service) as watch:
        while time.monotonic() < until:
            fault = ALL[chance.choice(names)]
            results += try_faults(
                service, [fault], seed=chance.randrange(10**6), n=min(fault.n, 10), whole=False
            )
    flat = [tell_slope(name, longest(watch, name)) for name in WATCHED]
    return results, all(flat)


def longest(watch: Watch, name: str) -> list[Sample]:
    """The samples of that part's process that lived longest."""
    return max((series for (part, _), series in watch.series.items() if part == name), key=len, default=[])


def tell_slope(name: str, samples: list[Sample]) -> bool:
    """One line: memory and descriptors of the first and the last quarter after the warm-up."""
    warm = samples[int(len(samples) * WARM_UP) :]
    if len(warm) < LEAST_SAMPLES:
        say(f"{name}: lived too briefly to tell ({len(samples)} samples)")
        return True
    quarter = len(warm) // 4
    first, last = warm[:quarter], warm[-quarter:]
    rss = [fmean(sample.rss_bytes for sample in part) for part in (first, last)]
    fds = [fmean(sample.fds for sample in part) for part in (first, last)]
    minutes = (warm[-1].at - warm[0].at) / 60
    flat = rss[1] - rss[0] <= max(GROWTH * rss[0], GROWTH_BYTES) and fds[1] - fds[0] <= GROWTH_FDS
    slope = (rss[1] - rss[0]) / 2**20 / (minutes * 0.75) * 60
    say(
        f"{name}: {minutes:.0f} min, {rss[0] / 2**20:.0f} -> {rss[1] / 2**20:.0f} MB ({slope:+.1f} MB/h), "
        f"{fds[0]:.0f} -> {fds[1]:.0f} descriptors  {'flat' if flat else 'GROWS'}"
    )
    return flat

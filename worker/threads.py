"""How the threads of torch wait for each other. Call before torch is imported; knows no model."""

from __future__ import annotations

import os

# Turns of a busy loop, some 10 µs: a short wait between two small products stays short, and a core that
# another process needs comes free. Without a bound threads spin through their neighbours' turns; with no
# spinning at all decoding a batch of 16 took 1.9 times as long (2 cores, SmolLM2-135M).
SPIN_COUNT = 10_000


def wait_briefly() -> None:
    """Bound the busy waiting of GNU's OpenMP, unless the operator has set it."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))

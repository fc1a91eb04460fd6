"""Checkpoint folders that are whole or absent, whatever kills the process and when.

Filled under a temporary name, sealed by a manifest, renamed. Knows nothing of models: a function fills
the folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from app.core.manifest import sync, write_manifest


def write_checkpoint(output_dir: Path, step: int, fill: Callable[[Path], None]) -> Path:
    """Let `fill` write files into a new folder below `output_dir`; return it once it is safe on disk."""
    final = output_dir / f"step-{step}"
    partial = output_dir / f".partial-step-{step}"
    shutil.rmtree(partial, ignore_errors=True)  # left by a death in the middle of this very step
    partial.mkdir(parents=True)
    fill(partial)
    write_manifest(partial, step=step)
    partial.rename(final)
    sync(output_dir)
    return final

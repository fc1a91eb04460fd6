"""Checkpoint folders that are whole or absent, whatever kills the process and when.

Written under a temporary name, synced, given a manifest of digests, synced again, renamed. Knows nothing
of models: a function fills the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

MANIFEST = "manifest.json"


def write_checkpoint(output_dir: Path, step: int, fill: Callable[[Path], None]) -> Path:
    """Let `fill` write files into a new folder below `output_dir`; return it once it is safe on disk."""
    final = output_dir / f"step-{step}"
    partial = output_dir / f".partial-step-{step}"
    shutil.rmtree(partial, ignore_errors=True)  # left by a death in the middle of this very step
    partial.mkdir(parents=True)
    fill(partial)
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    for path in files:
        _sync(path)
    manifest = {"step": step, "files": {str(path.relative_to(partial)): _described(path) for path in files}}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    _sync(partial / MANIFEST)
    for folder in [*(path for path in partial.rglob("*") if path.is_dir()), partial]:
        _sync(folder)
    partial.rename(final)
    _sync(output_dir)
    return final


def _described(path: Path) -> dict[str, str | int]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"sha256": digest, "size_bytes": path.stat().st_size}


def _sync(path: Path) -> None:
    """fsync of a file or folder: a rename is only safe once what it names is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Folders of weights that can prove they are whole: a manifest of digests, made last and checked first.

Plain files and hashes; knows no table, no model, no settings. Workers, `fsck` and the trainer share it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
_SEAL = "manifest_sha256"  # the manifest's own digest, of all but this entry
_UNSEALED = {"step", "files"}  # exactly what manifests held before they had a seal; such models still answer
TRAINING_STATE = "training_state"  # subfolder: all that a resume needs beside the weights; may be dropped


class DamagedError(Exception):
    """A folder does not hold what its manifest says; the text names the file, never a path."""


def write_manifest(folder: Path, **about: Any) -> None:
    """Sync every file below `folder`, write and sync the manifest over them, sync the folders.

    `about` is kept beside the digests. After this the folder is whole; a rename makes it visible.
    """
    files = {str(path.relative_to(folder)): path for path in sorted(_files(folder))}
    for path in files.values():
        sync(path)
    manifest = {"files": {name: _described(path) for name, path in files.items()}, **about}
    (folder / MANIFEST).write_bytes(_text(manifest | {_SEAL: _seal(manifest)}))
    sync(folder / MANIFEST)
    for path in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        sync(path)


def verify(folder: Path, *, with_state: bool = False, quick: bool = False) -> dict[str, Any]:
    """The manifest of `folder`, its files checked byte by byte; raises DamagedError.

    The training state is checked, and has to be there, only `with_state`. `quick` compares sizes alone.
    """
    manifest = _read(folder)
    files: dict[str, Any] = manifest["files"]
    state = f"{TRAINING_STATE}/"
    if with_state and not any(name.startswith(state) for name in files):
        raise DamagedError("it has no training state")
    for name, described in files.items():
        if with_state or not name.startswith(state):
            try:
                actual = _described(folder / name, quick=quick)
            except (OSError, ValueError):
                raise DamagedError(f"{name} is missing or unreadable") from None
            if actual != {key: described[key] for key in actual}:
                raise DamagedError(f"{name} has changed since it was written")
    return manifest


def sync(path: Path) -> None:
    """fsync of a file or folder: a rename is only safe once what it names is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read(folder: Path) -> dict[str, Any]:
    try:
        data = _bytes(folder / MANIFEST)
        manifest = json.loads(data)
        sealed = set(manifest) == _UNSEALED or manifest[_SEAL] == _seal(manifest)
        if data != _text(manifest) or not sealed:
            raise ValueError("a byte")
        entries = manifest["files"].values()
        if not all(isinstance(entry, dict) and {"sha256", "size_bytes"} == set(entry) for entry in entries):
            raise ValueError("an entry")
        if any(Path(name).is_absolute() or ".." in Path(name).parts for name in manifest["files"]):
            raise ValueError("a name")
    except FileNotFoundError:
        raise DamagedError("it has no manifest") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DamagedError("its manifest cannot be read") from None
    result: dict[str, Any] = manifest
    return result


def _seal(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(_text({key: manifest[key] for key in manifest if key != _SEAL})).hexdigest()


def _text(manifest: dict[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode()


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)


def _bytes(path: Path) -> bytes:
    if path.exists() and not path.is_file():  # opening a pipe would wait for ever
        raise OSError("no file")
    return path.read_bytes()


def _described(path: Path, *, quick: bool = False) -> dict[str, str | int]:
    if not path.is_file():
        raise OSError("no file")
    size_bytes = path.stat().st_size
    if quick:
        return {"size_bytes": size_bytes}
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"sha256": digest, "size_bytes": size_bytes}

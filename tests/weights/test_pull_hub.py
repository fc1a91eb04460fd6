"""Weights from a hub: the pinned commit, safe files only, held against the hub's digests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from app.core.base_models import BaseModelEntry, find_model_dir
from tests.tiny import build_tiny_model
from tests.weights.hub_server import COMMIT, REPOSITORY, Hub, hub_server
from worker.weights import Progress, WeightsError, check_model_dir, pull

ENTRY = BaseModelEntry(name="tiny", source=f"hf://{REPOSITORY}@{COMMIT}", context_length=512, licence="MIT")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A repository: a whole model, and beside it what must not be fetched."""
    folder = build_tiny_model(tmp_path_factory.mktemp("hub") / "model")
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    unwanted = {
        "pytorch_model.bin": b"a pickle",
        "modeling_tiny.py": b"code",
        "README.md": b"text",
        "onnx/config.json": b"{}",
        "training_args.bin": b"a pickle",
    }
    return found | unwanted


@pytest.fixture
def hub(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_server(dict(files)) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        yield server


def test_a_model_of_the_hub_loads_and_is_found_again(hub: Hub, tmp_path: Path) -> None:
    folder = pull(ENTRY, tmp_path)
    assert AutoModelForCausalLM.from_pretrained(folder).config.model_type == "llama"
    assert find_model_dir(ENTRY, tmp_path) == folder
    assert check_model_dir(ENTRY, tmp_path) == []
    hub.asked.clear()
    assert pull(ENTRY, tmp_path) == folder
    assert hub.asked == []


def test_pickles_and_code_are_not_even_asked_for(hub: Hub, tmp_path: Path) -> None:
    folder = pull(ENTRY, tmp_path)
    present = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "luthier.json"} <= present
    assert not [name for name in present if name.endswith((".bin", ".py", ".md"))]
    assert not [path for path in hub.asked if ".bin" in path or ".py" in path or "onnx" in path]
    assert all(COMMIT in path for path in hub.asked)
    assert not (folder / ".cache").exists()


def test_progress_reaches_the_total(hub: Hub, tmp_path: Path) -> None:
    seen: list[Progress] = []
    pull(ENTRY, tmp_path, seen.append)
    checking = [progress for progress in seen if progress.step == "checking"]
    assert checking[-1].done_bytes == checking[-1].total_bytes == len(hub.files["model.safetensors"])


def test_bytes_that_differ_from_the_hubs_digest_are_refused(hub: Hub, tmp_path: Path) -> None:
    hub.corrupt = "model.safetensors"
    with pytest.raises(WeightsError, match=r"model.safetensors of hf://org/tiny arrived with sha256"):
        pull(ENTRY, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".tiny.lock"}


def test_a_model_that_brings_code_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.files["config.json"] = b'{"auto_map": {"AutoConfig": "x.Y"}, ' + hub.files["config.json"].lstrip()[1:]
    with pytest.raises(WeightsError, match=r"wants code of its own to run \(auto_map\), which is never done"):
        pull(ENTRY, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".tiny.lock"}


def test_a_repository_without_safetensors_is_refused(hub: Hub, tmp_path: Path) -> None:
    del hub.files["model.safetensors"]
    with pytest.raises(WeightsError, match="holds no safetensors, and nothing else is loaded"):
        pull(ENTRY, tmp_path)


@pytest.mark.parametrize(
    ("status", "cure"),
    [(401, "accept its licence there and set HF_TOKEN"), (403, "set HF_TOKEN"), (404, "correct the entry")],
)
def test_what_the_hub_refuses_is_one_sentence(hub: Hub, status: int, cure: str, tmp_path: Path) -> None:
    hub.status = status
    with pytest.raises(WeightsError, match=cure) as error:
        pull(ENTRY, tmp_path)
    assert "\n" not in str(error.value)


def test_a_hub_that_is_away_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(WeightsError, match=r"could not be downloaded: .* name a mirror with HF_ENDPOINT"):
        pull(ENTRY, tmp_path)


def test_a_folder_of_the_operators_is_used_where_it_is(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "mine")
    entry = BaseModelEntry(name="mine", source=f"file://{folder}", context_length=512, licence="MIT")
    assert pull(entry, tmp_path / "models") == folder
    assert not (tmp_path / "models").exists()


def test_a_folder_without_a_model_is_one_sentence(tmp_path: Path) -> None:
    entry = BaseModelEntry(name="mine", source=f"file://{tmp_path}", context_length=512, licence="MIT")
    with pytest.raises(WeightsError, match=r"holds no config.json with \*.safetensors; put the model there"):
        pull(entry, tmp_path / "models")

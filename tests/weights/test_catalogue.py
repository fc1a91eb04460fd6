"""The catalogue: what is built in, what an operator adds, and how mistakes in it are told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from app.core.base_models import (
    DEFAULT_BASE_MODEL,
    MANIFEST,
    BaseModelEntry,
    CatalogueError,
    SourceKind,
    find_model_dir,
    load_catalogue,
    pinned,
)

COMMIT = "a" * 40
GOOD = 'context_length = 4096\nlicence = "MIT"\n'


def write(folder: Path, text: str) -> Path:
    file = folder / "models.toml"
    file.write_text(text)
    return file


def test_the_built_in_model_is_pinned_to_version_and_digest() -> None:
    entry = load_catalogue().entries[DEFAULT_BASE_MODEL]
    assert entry.kind is SourceKind.WHEEL
    assert (entry.revision, len(entry.sha256 or "")) == ("0.1.2", 64)
    assert (entry.context_length, entry.licence, entry.adapter) == (8192, "Apache-2.0", "qlora")


def test_an_operators_entries_are_added_and_replace_those_of_the_same_name(tmp_path: Path) -> None:
    text = (
        f'[models.{DEFAULT_BASE_MODEL}]\nsource = "file:///weights/mine"\n{GOOD}'
        f'[models.other]\nsource = "hf://org/repo@{COMMIT}"\n{GOOD}target_modules = ["q_proj"]\n'
    )
    catalogue = load_catalogue(write(tmp_path, text))
    assert catalogue.names == (DEFAULT_BASE_MODEL, "other")
    assert catalogue.entries[DEFAULT_BASE_MODEL].location == "/weights/mine"
    other = catalogue.entries["other"]
    assert (other.source, other.revision, other.location) == ("hf://org/repo", COMMIT, "org/repo")
    assert other.target_modules == ("q_proj",)


def test_a_name_that_is_not_there_is_not_found() -> None:
    assert load_catalogue().find("gpt-4o") is None


@pytest.mark.parametrize(
    ("text", "field", "reason"),
    [
        ('[models."a/b"]\nsource = "file:///m"\n' + GOOD, "name", "use letters, digits"),
        ('[models."ft:a"]\nsource = "file:///m"\n' + GOOD, "name", "use letters, digits"),
        (f"[models.{'x' * 65}]\nsource = 'file:///m'\n" + GOOD, "name", "at most 64"),
        ('[models.a]\nsource = "s3://bucket/m"\n' + GOOD, "source", "hf://, file:/// or wheel://"),
        ('[models.a]\nsource = "file://m/n"\n' + GOOD, "source", "absolute path"),
        ('[models.a]\nsource = "hf://repo"\n' + GOOD, "source", "hf://organization/repository"),
        (
            '[models.a]\nsource = "hf://org/repo@main"\n' + GOOD,
            "source",
            "40 hex digits: a branch or tag may move",
        ),
        ('[models.a]\nsource = "wheel://pkg/../x.gguf"\nrevision = "1.0"\n' + GOOD, "source", "inside.gguf"),
        ('[models.a]\nsource = "wheel://pkg/x.gguf"\n' + GOOD, "source", "the wheel's version"),
        ('[models.a]\nsource = "wheel://pkg/x.gguf"\nrevision = "1.0"\n' + GOOD, "source", "sha256 must be"),
        ('[models.a]\nsource = "file:///m"\nlicence = "MIT"\n', "context_length", "Field required"),
        (
            '[models.a]\nsource = "file:///m"\nlicence = "MIT"\ncontext_length = 0\n',
            "context_length",
            "greater than 0",
        ),
        ('[models.a]\nsource = "file:///m"\nrank = 4\n' + GOOD, "rank", "not permitted"),
        (
            '[models.a]\nsource = "file:///m"\nadapter = "dora"\n' + GOOD,
            "adapter",
            "'qlora', 'lora' or 'full'",
        ),
    ],
)
def test_a_mistake_names_file_entry_field_and_cure(
    text: str, field: str, reason: str, tmp_path: Path
) -> None:
    file = write(tmp_path, text)
    with pytest.raises(CatalogueError) as error:
        load_catalogue(file)
    sentence = str(error.value)
    assert str(file) in sentence
    assert f"field '{field}'" in sentence
    assert reason in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[models.a", "is not valid TOML"),
        ("[model.a]\n", "holds 'model' where only tables"),
        ("[models]\na = 3\n", r"has no table \[models.a\]"),
    ],
)
def test_a_file_of_another_form_is_one_sentence(text: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(CatalogueError, match=reason):
        load_catalogue(write(tmp_path, text))


def test_a_file_that_is_not_there_names_the_variable() -> None:
    with pytest.raises(CatalogueError, match=r"No such file.*LUTHIER_MODELS_FILE"):
        load_catalogue(Path("/no/such/models.toml"))


def test_a_folder_of_the_operators_is_used_in_place_when_it_is_whole(tmp_path: Path) -> None:
    folder = tmp_path / "my weights"
    folder.mkdir()
    source = f"file://{folder}".replace(" ", "%20")
    entry = BaseModelEntry(name="mine", source=source, context_length=8, licence="MIT")
    assert find_model_dir(entry, tmp_path) is None
    (folder / "config.json").write_text("{}")
    assert find_model_dir(entry, tmp_path) is None
    (folder / "model.safetensors").touch()
    assert find_model_dir(entry, tmp_path) == folder


def test_weights_count_only_with_their_manifest_and_every_file_in_its_size(tmp_path: Path) -> None:
    entry = BaseModelEntry(
        name="hub", source="hf://org/repo", revision=COMMIT, context_length=8, licence="MIT"
    )
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"12345")
    assert find_model_dir(entry, tmp_path) is None
    files = {"model.safetensors": {"size_bytes": 5, "sha256": "0" * 64}}
    (folder / MANIFEST).write_text(json.dumps({"pinned": pinned(entry), "files": files}))
    assert find_model_dir(entry, tmp_path) == folder
    (folder / "model.safetensors").write_bytes(b"1234")
    assert find_model_dir(entry, tmp_path) is None
    (folder / MANIFEST).write_text("{half")
    assert find_model_dir(entry, tmp_path) is None

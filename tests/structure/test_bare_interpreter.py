"""What a process of each kind loads, seen from a new interpreter.

`make bare` runs this file in environments with one extra each.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ONLY_EXTRA = os.environ.get("LUTHIER_BARE_EXTRA")  # set where nothing else is installed
GPU_LIBRARIES = {"torch", "transformers", "peft", "bitsandbytes", "accelerate"}
HTTP_LIBRARIES = {"fastapi", "starlette", "uvicorn"}

needs_api = pytest.mark.skipif(ONLY_EXTRA == "worker", reason="the extra api is not installed here")
needs_worker = pytest.mark.skipif(ONLY_EXTRA == "api", reason="the extra worker is not installed here")
only_bare = pytest.mark.skipif(ONLY_EXTRA is None, reason="all extras are installed here; see make bare")


def is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def run(code: str, folder: Path) -> str:
    """What `code` prints in a new interpreter that stands in `folder`, away from the sources."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LUTHIER_")}
    if not is_installed("luthier"):
        environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_by(modules: str, folder: Path) -> set[str]:
    """Top-level packages in memory after importing `modules`."""
    printed = run(
        f"import sys, {modules}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))", folder
    )
    return set(printed.split())


def import_all(package: str, folder: Path) -> int:
    """Import every module of a package in a new interpreter; how many there were."""
    code = f"""
import importlib, pkgutil, warnings
import {package} as package
warnings.filterwarnings("ignore", module="(torch|transformers|peft|bitsandbytes|accelerate)")
names = [m.name for m in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
print(len(names))
"""
    return int(run(code, folder))


@needs_api
def test_the_api_loads_neither_gpu_libraries_nor_workers(tmp_path: Path) -> None:
    assert loaded_by("app.api.main", tmp_path) & (GPU_LIBRARIES | {"worker", "numpy"}) == set()


def test_a_control_worker_loads_neither_http_nor_gpu_libraries(tmp_path: Path) -> None:
    loaded = loaded_by("worker.main, worker.control", tmp_path)
    assert loaded & (GPU_LIBRARIES | HTTP_LIBRARIES) == set()


def test_the_celery_side_of_a_training_worker_loads_neither_http_nor_gpu_libraries(tmp_path: Path) -> None:
    loaded = loaded_by("worker.main, worker.runner, worker.trainer", tmp_path)
    assert loaded & (GPU_LIBRARIES | HTTP_LIBRARIES) == set()


def test_the_command_starts_without_loading_any_of_them(tmp_path: Path) -> None:
    loaded = loaded_by("app.cli.main", tmp_path)
    assert loaded & (GPU_LIBRARIES | HTTP_LIBRARIES | {"sqlalchemy", "celery"}) == set()


@needs_worker
def test_training_and_serving_load_no_http_and_no_database(tmp_path: Path) -> None:
    loaded = loaded_by("worker.training.__main__, worker.serving.engine", tmp_path)
    assert loaded & (HTTP_LIBRARIES | {"sqlalchemy", "celery", "kombu", "psycopg"}) == set()
    assert "torch" in loaded


@needs_api
@pytest.mark.parametrize("package", ["app.core", "app.api"])
def test_every_module_the_api_may_need_can_be_imported(package: str, tmp_path: Path) -> None:
    assert import_all(package, tmp_path) > 10


@needs_worker
def test_every_module_of_the_workers_can_be_imported(tmp_path: Path) -> None:
    assert import_all("worker", tmp_path) > 20


def test_migrations_and_the_catalogue_travel_with_the_package(tmp_path: Path) -> None:
    code = """
from alembic.script import ScriptDirectory
from app.core.base_models import DEFAULT_BASE_MODEL, load_catalogue
from app.core.migrate import _config
print(ScriptDirectory.from_config(_config("")).get_current_head())
print(load_catalogue(None).find(DEFAULT_BASE_MODEL).name)
"""
    head, model = run(code, tmp_path).split()
    assert head != "None"
    assert model == "smollm2-135m-instruct"


@only_bare
def test_the_package_is_installed_and_not_read_from_the_clone(tmp_path: Path) -> None:
    assert Path(run("import app; print(app.__file__)", tmp_path).strip()).is_relative_to(sys.prefix)


@only_bare
def test_an_image_without_torch_has_none_by_accident() -> None:
    assert is_installed("torch") == (ONLY_EXTRA == "worker")
    assert is_installed("fastapi") == (ONLY_EXTRA == "api")


@only_bare
@pytest.mark.parametrize("words", [["--help"], ["worker", "--help"], ["models", "list"]])
def test_the_command_works(words: list[str], tmp_path: Path) -> None:
    luthier = Path(sys.executable).with_name("luthier")
    done = subprocess.run([luthier, *words], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr

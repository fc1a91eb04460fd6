"""The rules of size and shape: what a reader can hold in their head."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.structure.sources import ALL, ROOT, SHIPPED, at, functions, parse, python_files

MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 60
MAX_LOOP_LINES = 90  # the training loop may be read as one page
LOOP = (ROOT / "worker" / "training" / "loop.py", "train")
MAX_PARAMETERS = 5
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "manager", "base", "misc"}


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


def lines_allowed(path: Path, name: str) -> int:
    return MAX_LOOP_LINES if (path, name) == LOOP else MAX_FUNCTION_LINES


def test_no_file_is_longer_than_a_reader_follows() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in python_files(*ALL)}
    assert len(lengths) > 100
    assert [at(path, lines) for path, lines in lengths.items() if lines > MAX_FILE_LINES] == []


def test_no_function_is_longer_than_a_page() -> None:
    too_long = [
        f"{at(path, function.lineno)} {function.name}: {length(function)} lines"
        for path in python_files(*ALL)
        for function in functions(path)
        if length(function) > lines_allowed(path, function.name)
    ]
    assert too_long == []


def test_positional_parameters_are_few() -> None:
    """Beyond two they are given by name, so that a call reads without the signature."""
    many = []
    for path in python_files("app/core", "app/api", "worker"):
        for function in functions(path):
            arguments = function.args
            positional = [
                a.arg for a in (*arguments.posonlyargs, *arguments.args) if a.arg not in ("self", "cls")
            ]
            if len(positional) + len(arguments.kwonlyargs) > MAX_PARAMETERS:
                many.append(f"{at(path, function.lineno)} {function.name}")
    assert many == []


def test_every_module_says_what_it_is() -> None:
    silent = [
        at(path, 1)
        for path in python_files(*SHIPPED)
        if not ast.get_docstring(parse(path)) and path.read_text(encoding="utf-8").strip()
    ]
    assert silent == []


def test_no_module_has_a_name_that_says_nothing() -> None:
    assert [at(path, 1) for path in python_files(*ALL) if path.stem in VAGUE_NAMES] == []

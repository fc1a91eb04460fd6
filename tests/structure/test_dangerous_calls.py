"""Calls that would run what a stranger wrote: found in the syntax, so no run has to reach them."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.structure.sources import SHIPPED, at, imported, parse, python_files

PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}


def keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((k.value for k in call.keywords if k.arg == name), None)


def is_true(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is True


def complaints(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and reason of every dangerous call of a syntax tree."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name in ("eval", "exec", "compile", "os.system", "os.popen"):
            yield node.lineno, f"{name} runs text"
        if name == "torch.load" and not is_true(keyword(node, "weights_only")):
            yield node.lineno, "torch.load without weights_only=True unpickles"
        if name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
            yield node.lineno, f"{name} builds objects"
        for option in ("shell", "trust_remote_code"):
            value = keyword(node, option)
            if value is not None and not (isinstance(value, ast.Constant) and value.value is False):
                yield node.lineno, f"{option} must stay off"
        if name.endswith("from_pretrained") and is_false(keyword(node, "use_safetensors")):
            yield node.lineno, "weights are safetensors, never pickles"


def is_false(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is False


def test_nothing_shipped_runs_what_a_stranger_wrote() -> None:
    found = [
        f"{at(path, line)} {reason}"
        for path in python_files(*SHIPPED)
        for line, reason in complaints(parse(path))
    ]
    assert found == []


def test_nothing_shipped_unpickles() -> None:
    assert [at(path, 1) for path in python_files(*SHIPPED) if imported(path) & PICKLES] == []


@pytest.mark.parametrize(
    "source",
    [
        "eval(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text)",
        "subprocess.run(text, shell=True)",
        "subprocess.run(text, shell=flag)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "AutoModel.from_pretrained(path, use_safetensors=False)",
    ],
)
def test_the_gate_finds_what_it_is_for(source: str) -> None:
    assert len(list(complaints(ast.parse(source)))) == 1


@pytest.mark.parametrize(
    "source",
    ["torch.load(path, weights_only=True)", "run(argv, shell=False)", "re.compile(text)", "model.eval()"],
)
def test_the_gate_lets_harmless_calls_pass(source: str) -> None:
    assert list(complaints(ast.parse(source))) == []

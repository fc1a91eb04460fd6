"""The rings and the absence of cycles, from the import graph itself."""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter

import grimp
from importlinter.cli import lint_imports

from tests.structure.sources import ROOT


def test_the_import_contracts_hold() -> None:
    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == 0


def test_no_module_imports_itself_by_a_detour() -> None:
    graph = grimp.build_graph("app", "worker", "migrations", cache_dir=None)
    sorter = TopologicalSorter(
        {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    )
    try:
        sorter.prepare()
    except CycleError as error:
        raise AssertionError(" → ".join(error.args[1])) from None
    assert len(graph.modules) > 80

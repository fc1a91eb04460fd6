"""The rings and the absence of cycles, from the import graph itself."""

from __future__ import annotations

import subprocess
import sys
from graphlib import CycleError, TopologicalSorter

import grimp

from tests.structure.sources import ROOT


def test_the_import_contracts_hold() -> None:
    # In a process of its own: import-linter turns off every logger it did not make.
    call = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", call], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


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

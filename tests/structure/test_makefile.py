"""The Makefile and the scripts of continuous integration: what is typed exists, and help tells all of it."""

from __future__ import annotations

import os
import re
import subprocess

from tests.structure.sources import ROOT

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, flags=re.MULTILINE))


def test_make_alone_prints_every_target_with_its_purpose() -> None:
    done = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    told = dict(re.findall(r"^make (\S+) +(\S.*)$", done.stdout, flags=re.MULTILINE))
    assert set(told) == TARGETS
    assert {"demo", "test", "check"} <= TARGETS
    assert len(TARGETS) <= 20


def test_every_target_is_a_name_and_not_a_file() -> None:
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE, flags=re.MULTILINE)
    assert phony is not None
    assert set(phony[1].split()) == TARGETS


def test_ci_runs_targets_that_exist() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    called = set(re.findall(r"^\s*make (\w+)", script.read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert {"check", "test"} <= called <= TARGETS


def test_a_machine_without_a_fitting_python_gets_one_sentence() -> None:
    missing = subprocess.run(
        ["make", "setup", "PYTHON=/nonexistent/python", "VENV=/nonexistent/venv"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert missing.returncode != 0
    assert "no Python 3.11 to 3.13" in missing.stderr
    assert "make PYTHON=" in missing.stderr

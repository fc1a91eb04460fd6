"""The closed list of failure codes is the one users read about, and every code has its rule."""

from __future__ import annotations

import re

from app.core.failures import CURES, FAULTS, FailureCode, Fault
from tests.structure.sources import ROOT


def test_the_documentation_lists_exactly_the_codes_there_are() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    table = text.split("| `error.code` | what to do |")[1].split("\n\n")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    listed = [code for row in rows for code in re.findall(r"`(\w+)`", row)]
    assert sorted(listed) == sorted(FailureCode)


def test_every_code_has_a_fault_and_those_without_a_message_of_their_own_a_cure() -> None:
    assert set(FAULTS) == set(FailureCode)
    told_by_code = {code for code, fault in FAULTS.items() if fault in (Fault.MACHINE, Fault.HOST_MEMORY)}
    assert set(CURES) == told_by_code

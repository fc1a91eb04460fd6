"""How good an answer of the shop example is. Pure: text against text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

KEYS = ["intent", "urgency", "product", "reply"]


@dataclass(frozen=True, slots=True)
class Row:
    """One held-out row: the message, and what the shop would have written."""

    system: str
    message: str
    expected: dict[str, str]


@dataclass(frozen=True, slots=True)
class Score:
    """Counts over all rows."""

    rows: int
    valid_json: int
    right_keys: int
    right_intent: int
    right_urgency: int
    right_product: int

    def share(self, name: str) -> float:
        """A count as a share of the rows, 0..1."""
        count: int = getattr(self, name)
        return count / self.rows

    def beats(self, other: Score) -> bool:
        """More intents right, and at least as many answers in the right form."""
        return self.right_intent > other.right_intent and self.right_keys >= other.right_keys


def parse_answer(answer: str) -> dict[str, object] | None:
    """The JSON object an answer is, or None when it is anything else."""
    try:
        value = json.loads(answer)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def score(rows: Sequence[Row], answers: Sequence[str]) -> Score:
    """Hold each answer against its row."""
    parsed = [parse_answer(answer) for answer in answers]
    formed = [value if value is not None and list(value) == KEYS else None for value in parsed]

    def right(key: str) -> int:
        pairs = zip(rows, formed, strict=True)
        return sum(value is not None and value[key] == row.expected[key] for row, value in pairs)

    return Score(
        rows=len(rows),
        valid_json=sum(value is not None for value in parsed),
        right_keys=sum(value is not None for value in formed),
        right_intent=right("intent"),
        right_urgency=right("urgency"),
        right_product=right("product"),
    )


def read_rows(lines: Sequence[str]) -> list[Row]:
    """The rows of a held-out file in the chat format."""
    rows = []
    for line in lines:
        system, user, assistant = json.loads(line)["messages"]
        rows.append(Row(system["content"], user["content"], json.loads(assistant["content"])))
    return rows

"""The JSONL chat format: bytes of a file become typed examples, or an error that names line and cure.

Knows nothing of storage, tokens or jobs. The validator and the trainer read through this one
module, so what the first accepts the second can train on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Example:
    """One line of a training file: a conversation and the tools it may call."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    parallel_tool_calls: bool = True


class DatasetError(ValueError):
    """A line that cannot be trained on. The text is shown to the user as it is."""

    def __init__(self, message: str, *, example: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.example = example


def read_examples(lines: Iterable[bytes]) -> Iterator[Example]:
    """Yield the examples of a training file; raise DatasetError at the first bad line."""
    raise DatasetError("not written yet")

"""The JSONL chat format: bytes of a file become typed examples, or an error that names line and cure.

Knows nothing of storage, tokens or jobs. The validator and the trainer read through this one
module, so what the first accepts the second can train on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any

from app.core.json_text import JsonError, parse_json
from app.core.messages import MessageError, check_messages, check_tools, has_assistant

Message = dict[str, Any]
BOM = b"\xef\xbb\xbf"
_KEYS = {"messages", "tools", "parallel_tool_calls"}


@dataclass(frozen=True, slots=True)
class Example:
    """One line of a training file: a conversation and the tools it may call."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    parallel_tool_calls: bool = True


class DatasetError(ValueError):
    """A file that cannot be trained on. `message` is shown to the user; `example` counts from 1."""

    def __init__(self, message: str, *, example: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.example = example


def read_lines(file: IO[bytes], *, max_line_bytes: int = 4 * 2**20) -> Iterator[bytes]:
    """The lines of a file, split at newline bytes alone, never more than one held in memory.

    A BOM, CRLF and blank lines at the very end are let pass; a blank line before data is an error.
    """
    number, blank = 0, None
    while line := file.readline(max_line_bytes + 1):
        number += 1
        if len(line) > max_line_bytes:
            raise DatasetError(
                f"Invalid file format. Line {number} is longer than {max_line_bytes} bytes. "
                "Each line holds one example; split the file at the ends of the examples",
                example=number,
            )
        line = (line.removeprefix(BOM) if number == 1 else line).rstrip(b"\r\n")
        if not line.strip():
            blank = blank or number
            continue
        if blank is not None:
            text = f"Invalid file format. Line {blank} is empty. Remove empty lines between examples"
            raise DatasetError(text, example=blank)
        yield line


def read_examples(lines: Iterable[bytes]) -> Iterator[Example]:
    """The examples of a file, checked one by one; raises DatasetError at the first bad line."""
    for number, line in enumerate(lines, start=1):
        try:
            yield _example(parse_json(line))
        except JsonError as error:
            text = f"Invalid file format. Example {number} (line {number}) is {_state(error)}. "
            raise DatasetError(text + "Each line must be one JSON object", example=number) from None
        except MessageError as error:
            place = f"Example {number}" + ("" if error.index is None else f", message {error.index + 1}")
            raise DatasetError(f"Invalid file format. {place} {error.text}", example=number) from None


def _state(error: JsonError) -> str:
    text = str(error)
    return text if text.startswith(("not", "nested")) else f"refused: {text}"


def _example(value: object) -> Example:
    if not isinstance(value, dict):
        raise MessageError("is not a JSON object")
    value = {key: item for key, item in value.items() if item is not None}
    if "messages" not in value:
        raise MessageError(_wrong_format(value))
    for key in value:
        if key in ("functions", "function_call"):
            raise MessageError(f"has the retired key '{key}'; use 'tools'")
        if key not in _KEYS:
            raise MessageError(f"has the unknown key '{key[:40]}'; allowed are {', '.join(sorted(_KEYS))}")
    parallel = value.get("parallel_tool_calls", True)
    if not isinstance(parallel, bool):
        raise MessageError("has a 'parallel_tool_calls' that is neither true nor false")
    messages = check_messages(value["messages"])
    if not has_assistant(messages):
        raise MessageError("has no assistant message, so there is nothing to learn from it")
    return Example(messages, check_tools(value.get("tools")), parallel)


def _wrong_format(value: dict[str, Any]) -> str:
    if "preferred_output" in value:
        return "is a preference pair, but the method of the job is 'supervised', which needs 'messages'"
    if "prompt" in value:
        return (
            "is a prompt/completion pair; write it as chat: 'messages' with a user and an assistant message"
        )
    return "has no 'messages'; the chat format is expected"

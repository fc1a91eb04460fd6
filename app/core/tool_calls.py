"""Tool calls in the text of an answer, in the Hermes format: `<tool_call>{"name", "arguments"}</tool_call>`.

Reads an answer piece by piece and gives out its plain text and its calls as they come. Knows neither words on
the wire nor HTTP.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([A-Za-z0-9_-]{1,64})"\s*,\s*"arguments"\s*:\s*(?=\{)')
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True, slots=True)
class Text:
    """Words beside the calls."""

    text: str


@dataclass(frozen=True, slots=True)
class Begin:
    """Call `number` of this answer begins."""

    number: int
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of the arguments of call `number`, as JSON text."""

    number: int
    text: str


Piece = Text | Begin | Arguments


class CallReader:
    """Splits one answer. `push` text as it comes, `finish` at its end; what reads as no call stays text."""

    def __init__(self) -> None:
        self.calls = 0  # begun so far
        self._held = ""  # not given out yet
        self._step: Callable[[], Iterator[Piece]] = self._read_text
        self._value = _JsonObject()

    def push(self, text: str) -> list[Piece]:
        """What is certain after more text."""
        self._held += text
        pieces: list[Piece] = []
        while True:
            step, length = self._step, len(self._held)
            pieces += step()
            if self._step == step and len(self._held) == length:
                return pieces

    def finish(self) -> list[Piece]:
        """What is left: a call that never came to its arguments was text."""
        rest, self._held = self._held, ""
        if self._step == self._read_head:
            return [Text(OPEN + rest)]
        if self._step == self._read_text and rest and not (self.calls and rest.isspace()):
            return [Text(rest)]
        return []

    def _read_text(self) -> Iterator[Piece]:
        at = self._held.find(OPEN)
        if at >= 0:
            text, self._held = self._held[:at], self._held[at + len(OPEN) :]
            self._step = self._read_head
        else:
            certain = len(self._held) - _partial(self._held, OPEN)
            text, self._held = self._held[:certain], self._held[certain:]
        # White space goes out with what follows it: before a call it is none of the answer's.
        said = text.rstrip()
        if at < 0:
            self._held = text[len(said) :] + self._held
        if said:
            yield Text(said)

    def _read_head(self) -> Iterator[Piece]:
        found = _HEAD.match(self._held)
        if found:
            self._held = self._held[found.end() :]
            self._value = _JsonObject()
            self._step = self._read_arguments
            yield self._begin(found[1])
            return
        at = self._held.find(CLOSE)
        if at < 0:
            return
        whole, self._held = self._held[:at], self._held[at + len(CLOSE) :]
        self._step = self._read_text
        call = _parse(whole)
        if call is None:
            yield Text(OPEN + whole + CLOSE)
        else:
            begin = self._begin(call[0])
            yield begin
            yield Arguments(begin.number, call[1])

    def _read_arguments(self) -> Iterator[Piece]:
        length = self._value.feed(self._held)
        text, self._held = self._held[:length], self._held[length:]
        if self._value.closed:
            self._step = self._read_tail
        if text:
            yield Arguments(self.calls - 1, text)

    def _read_tail(self) -> Iterator[Piece]:
        at = self._held.find(CLOSE)
        if at < 0:
            self._held = self._held[len(self._held) - _partial(self._held, CLOSE) :]
        else:
            self._held = self._held[at + len(CLOSE) :]
            self._step = self._read_text
        yield from ()

    def _begin(self, name: str) -> Begin:
        self.calls += 1
        return Begin(self.calls - 1, name)


class _JsonObject:
    """Finds where a JSON object ends, fed piece by piece."""

    def __init__(self) -> None:
        self.closed = False
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def feed(self, text: str) -> int:
        """How many characters of `text` belong to the object."""
        for at, char in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = self._in_string
            elif char == '"':
                self._in_string = not self._in_string
            elif not self._in_string:
                self._depth += (char in "{[") - (char in "}]")
                if self._depth == 0:
                    self.closed = True
                    return at + 1
        return len(text)


def _parse(text: str) -> tuple[str, str] | None:
    """Name and arguments of a call whose keys come in another order; None if it is no call."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    name = call.get("name") if isinstance(call, dict) else None
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return None
    arguments = call.get("arguments", {})
    return name, arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _partial(text: str, word: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `word`."""
    for length in range(min(len(text), len(word) - 1), 0, -1):
        if word.startswith(text[-length:]):
            return length
    return 0

"""Tool calls are found in an answer however it is cut into pieces."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.tool_calls import CLOSE, OPEN, Arguments, Begin, CallReader, Text


def call(name: str, arguments: str) -> str:
    return f'{OPEN}\n{{"name": "{name}", "arguments": {arguments}}}\n{CLOSE}'


def read(text: str, cuts: list[int] | None = None) -> tuple[str, list[tuple[str, str]]]:
    """Plain text and calls of an answer that comes in these pieces (by default letter by letter)."""
    edges = sorted(
        {0, len(text), *(range(len(text)) if cuts is None else (c % (len(text) + 1) for c in cuts))}
    )
    reader = CallReader()
    pieces = [p for a, b in pairwise(edges) for p in reader.push(text[a:b])]
    pieces += reader.finish()
    calls: list[list[str]] = []
    said = ""
    for piece in pieces:
        if isinstance(piece, Text):
            assert piece.text
            said += piece.text
        elif isinstance(piece, Begin):
            assert piece.number == len(calls)
            calls.append([piece.name, ""])
        elif isinstance(piece, Arguments):
            assert piece.number == len(calls) - 1
            calls[-1][1] += piece.text
    assert reader.calls == len(calls)
    return said, [(name, arguments) for name, arguments in calls]


def test_an_answer_without_calls_is_its_text():
    for text in ("", "Hello.", " a \n", "1 < 2 <tool", "a <tool_cal> b", "\n"):
        assert read(text) == (text, [])


def test_calls_are_told_from_the_text_before_them():
    arguments = '{"city": "Paris \\"<b>\\" }", "n": [1, {"x": {}}]}'
    text = f"I will look.\n{call('f', arguments)}\n{call('g', '{}')}\n"
    assert read(text) == ("I will look.", [("f", arguments), ("g", "{}")])
    assert json.loads(arguments)["n"] == [1, {"x": {}}]


def test_arguments_come_as_they_are_written():
    reader = CallReader()
    reader.push(f'{OPEN}\n{{"name": "f", "arguments": ')
    assert reader.push('{"a') == [Begin(0, "f"), Arguments(0, '{"a')]
    assert reader.push('": 1') == [Arguments(0, '": 1')]
    assert reader.push("}") == [Arguments(0, "}")]
    assert reader.push("}\n" + CLOSE) == []


def test_a_call_with_its_keys_in_another_order_or_arguments_as_text_is_read_too():
    text = f'{OPEN}{{"arguments": {{"a": "ü"}}, "name": "f"}}{CLOSE}'
    assert read(text) == ("", [("f", '{"a": "ü"}')])
    assert read(f'{OPEN}{{"name": "f", "arguments": "{{}}"}}{CLOSE}') == ("", [("f", "{}")])
    assert read(f'{OPEN}{{"name": "f"}}{CLOSE}') == ("", [("f", "{}")])


@pytest.mark.parametrize(
    "text",
    [
        f"{OPEN} nonsense {CLOSE} and more",
        f"see {OPEN} for yourself",
        f'{OPEN}{{"name": "no such name!", "arguments": {{}}}}{CLOSE}',
        f"{OPEN}[1]{CLOSE}",
        OPEN,
    ],
)
def test_what_reads_as_no_call_stays_text(text: str):
    said, calls = read(text)
    assert (said.replace(" ", ""), calls) == (text.replace(" ", ""), [])


def test_a_call_cut_off_in_its_arguments_keeps_what_it_has():
    assert read(f'{OPEN}\n{{"name": "f", "arguments": {{"a": [1, 2') == ("", [("f", '{"a": [1, 2')])


@given(
    before=st.sampled_from(["", "ok ", "<tool", "a\n\n", "{}", "\\"]),
    values=st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=8) | st.integers()), max_size=3),
    cuts=st.lists(st.integers(0, 10_000), max_size=12),
)
def test_the_pieces_do_not_matter(before: str, values: list[dict[str, object]], cuts: list[int]):
    calls = [("f", json.dumps(value)) for value in values]
    text = before + "\n".join(call(*one) for one in calls)
    expected = before.rstrip() if calls else before
    assert read(text, cuts) == read(text) == (expected, calls)

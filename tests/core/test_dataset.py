"""Bytes of a file become examples, or a sentence that names the example, the message and the cure."""

from __future__ import annotations

import io
import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.dataset import DatasetError, Example, read_examples, read_lines

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "hello"}
GOOD = {"messages": [USER, ANSWER]}
LINE = json.dumps(GOOD).encode()
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"a": 1}'}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def read(data: bytes, **limits: int) -> list[Example]:
    return list(read_examples(read_lines(io.BytesIO(data), **limits)))


def fault(data: bytes, **limits: int) -> str:
    with pytest.raises(DatasetError) as caught:
        read(data, **limits)
    assert caught.value.message.startswith("Invalid file format. ")
    return caught.value.message


def fault_of(value: Any) -> str:
    """What is said of a second line that holds `value`, without its beginning."""
    text = fault(LINE + b"\n" + json.dumps(value).encode())
    assert text.startswith("Invalid file format. Example 2")
    return text.removeprefix("Invalid file format. Example 2")


@pytest.mark.parametrize(
    "data",
    [
        LINE + b"\n" + LINE + b"\n",
        LINE + b"\n" + LINE,
        b"\xef\xbb\xbf" + LINE + b"\n" + LINE,
        LINE + b"\r\n" + LINE + b"\r\n",
        LINE + b"\n" + LINE + b"\n\n \n\r\n",
        LINE + b"\n  " + LINE + b"\t \n",
    ],
    ids=["plain", "no last newline", "BOM", "CRLF", "blank end", "spaces"],
)
def test_a_file_as_editors_leave_it_is_read(data: bytes) -> None:
    assert [example.messages for example in read(data)] == [GOOD["messages"]] * 2


def test_line_separators_of_unicode_and_nul_inside_a_string_do_not_split_a_line() -> None:
    content = "a\u2028b\u2029c\x85d\x0b\x0ce\0f"
    text = json.dumps({"messages": [USER, {"role": "assistant", "content": content}]}, ensure_ascii=False)
    [example] = read(text.encode())
    assert example.messages[1]["content"] == content


def test_a_blank_line_between_examples_is_named() -> None:
    assert "Line 2 is empty. Remove empty lines" in fault(LINE + b"\n\n" + LINE)


def test_an_empty_file_has_no_examples() -> None:
    assert read(b"") == []
    assert read(b"\n\n") == []
    assert read(b"\xef\xbb\xbf") == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"id,text", "not valid JSON at character 1"),
        (b"\x89PNG\x00\xff", "not valid UTF-8 at byte 1"),
        (LINE[:-3], "not valid JSON"),
        (LINE + LINE, "not valid JSON at character"),
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', "not valid UTF-8"),
        (LINE.decode().encode("utf-16"), "not valid UTF-8 at byte 1"),
        (b'{"messages": "\\ud800"}', "lone surrogate"),
        (b'{"messages": [], "weight": NaN}', "NaN is not JSON"),
        (b'{"messages": [], "messages": []}', "duplicate key 'messages'"),
        (b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested deeper than 100 levels"),
        (b'{"messages": ' + b"9" * 10_000 + b"}", "too many digits"),
        (b"\xef\xbb\xbf" + LINE, "not valid JSON"),
    ],
    ids=[
        "csv",
        "png",
        "cut",
        "two",
        "utf8",
        "utf16",
        "surrogate",
        "nan",
        "twice",
        "deep",
        "huge",
        "late BOM",
    ],
)
def test_a_line_that_is_not_json_is_named(line: bytes, words: str) -> None:
    text = fault(LINE + b"\n" + line)
    assert text.startswith("Invalid file format. Example 2 (line 2) is ")
    assert words in text
    assert text.endswith("Each line must be one JSON object")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([], " is not a JSON object"),
        ("text", " is not a JSON object"),
        (None, " is not a JSON object"),
        ({}, " has no 'messages'; the chat format is expected"),
        ({"prompt": "a", "completion": "b"}, " is a prompt/completion pair; write it as chat"),
        (
            {"input": {"messages": [USER]}, "preferred_output": [ANSWER], "non_preferred_output": [ANSWER]},
            " is a preference pair, but the method of the job is 'supervised'",
        ),
        ({"messages": []}, " 'messages' must be a list with at least one message"),
        ({"messages": {"role": "user"}}, " 'messages' must be a list"),
        ({"messages": None}, " has no 'messages'"),
        ({"messages": [USER]}, " has no assistant message"),
        (
            {**GOOD, "extra": 1},
            " has the unknown key 'extra'; allowed are messages, parallel_tool_calls, tools",
        ),
        ({**GOOD, "functions": []}, " has the retired key 'functions'; use 'tools'"),
        ({**GOOD, "parallel_tool_calls": "yes"}, " has a 'parallel_tool_calls' that is neither"),
        ({**GOOD, "tools": [TOOL] * 129}, " 'tools' must be a list of 1 to 128 tools"),
        ({**GOOD, "tools": [{"type": "function"}]}, " tools[0].function.name must be"),
        ({**GOOD, "tools": [TOOL, {"type": "code"}]}, " tools[1] must be an object with type 'function'"),
    ],
)
def test_a_wrong_example_is_named(value: object, words: str) -> None:
    assert fault_of(value).startswith(words)


def second(message: object) -> dict[str, Any]:
    return {"messages": [USER, message, ANSWER]}


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("hi", "is not an object"),
        ({"content": "x"}, "Discriminator 'role' is missing in value"),
        (
            {"role": "bot", "content": "x"},
            'role "bot" is not one of system, developer, user, assistant, tool',
        ),
        ({"role": ["user"], "content": "x"}, "role ["),
        ({"role": None, "content": "x"}, "role null"),
        ({"role": "function", "content": "x"}, "role 'function' is retired"),
        ({"role": "user"}, "'content' is missing"),
        ({"role": "user", "content": None}, "'content' is missing"),
        ({"role": "user", "content": 5}, "'content' must be a string or a list of text parts"),
        ({"role": "user", "content": []}, "'content' must be a string or a list"),
        (
            {"role": "user", "content": [{"type": "image_url"}]},
            "content part 1 is of type 'image_url'; only text",
        ),
        ({"role": "user", "content": [{"type": "text"}]}, "content part 1"),
        (
            {"role": "user", "content": "x", "weight": 1},
            "key 'weight' does not belong in a message of role 'user'",
        ),
        ({"role": "assistant", "content": "x", "weight": 0.5}, "'weight' must be 0 or 1"),
        ({"role": "assistant", "content": "x", "weight": True}, "'weight' must be 0 or 1"),
        ({"role": "assistant", "content": "x", "weight": "1"}, "'weight' must be 0 or 1"),
        ({"role": "assistant", "content": "x", "weight": 2**70}, "'weight' must be 0 or 1"),
        ({"role": "assistant", "content": None}, "'content' is missing"),
        ({"role": "assistant", "content": "x", "function_call": {}}, "'function_call' is retired"),
        ({"role": "assistant", "tool_calls": []}, "'content' is missing"),
        (
            {"role": "assistant", "content": "x", "tool_calls": []},
            "'tool_calls' must be a list with at least one",
        ),
        ({"role": "assistant", "tool_calls": [{"id": "a"}]}, "tool_calls[0] must be {id, type"),
        (
            {"role": "assistant", "tool_calls": [CALL | {"function": {"name": "look", "arguments": {}}}]},
            "tool_calls[0].function.arguments must be a string that holds JSON",
        ),
        (
            {"role": "assistant", "tool_calls": [CALL | {"function": {"name": "look", "arguments": "{"}}]},
            "tool_calls[0].function.arguments must be a string that holds JSON",
        ),
        ({"role": "tool", "content": "x"}, "'tool_call_id' is missing"),
        ({"role": "tool", "content": "x", "tool_call_id": "c1"}, "'tool_call_id' 'c1' answers no tool call"),
        ({"role": "user", "content": "x", "name": ""}, "'name' must be a string of 1 to 64 characters"),
        ({"role": "user", "content": "x", "name": "n" * 65}, "'name' must be a string"),
    ],
)
def test_a_wrong_message_is_named_by_number(message: object, words: str) -> None:
    assert fault_of(second(message)).startswith(f", message 2 {words}")


def test_many_turns_with_tools_weights_names_and_parts_are_accepted() -> None:
    messages = [
        {"role": "system", "content": "Be kind.", "name": "shop"},
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL], "weight": 0},
        {"role": "tool", "content": "42", "tool_call_id": "c1"},
        {"role": "assistant", "content": "It is 42.", "weight": 1},
    ]
    [example] = read(
        json.dumps({"messages": messages, "tools": [TOOL], "parallel_tool_calls": False}).encode()
    )
    assert example == Example(messages, [TOOL], False)


def test_the_error_carries_its_example_number() -> None:
    with pytest.raises(DatasetError) as caught:
        read(LINE + b"\n" + LINE + b"\n[]")
    assert caught.value.example == 3


def test_one_huge_line_is_refused_without_holding_it() -> None:
    class Endless(io.RawIOBase):
        left = 200 * 2**20

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            count = min(len(buffer), self.left)
            buffer[:count] = b"a" * count
            self.left -= count
            return count

    tracemalloc.start()
    try:
        with pytest.raises(DatasetError, match="Line 1 is longer than 1048576 bytes"):
            list(read_lines(io.BufferedReader(Endless()), max_line_bytes=2**20))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * 2**20


def test_a_line_of_exactly_the_limit_is_read() -> None:
    assert len(read(LINE + b"\n", max_line_bytes=len(LINE) + 1)) == 1
    assert "longer than" in fault(LINE + b"\n", max_line_bytes=len(LINE) - 1)


def test_examples_come_before_a_later_line_is_read() -> None:
    examples = read_examples(read_lines(io.BytesIO(LINE + b"\nbroken")))
    assert next(examples).messages == GOOD["messages"]
    with pytest.raises(DatasetError):
        next(examples)


@given(st.lists(st.binary(max_size=40) | st.sampled_from([LINE, b"", b"{}", b"\xef\xbb\xbf"]), max_size=6))
def test_any_bytes_give_examples_or_a_dataset_error(lines: list[bytes]) -> None:
    try:
        examples = read(b"\n".join(lines))
    except DatasetError as error:
        assert error.message
        assert error.example is not None
    else:
        assert all(example.messages for example in examples)


def test_nulls_and_no_tools_are_as_good_as_absent() -> None:
    answer = {**ANSWER, "function_call": None, "tool_calls": None, "weight": None, "name": None}
    line = {"messages": [USER, answer], "tools": [], "functions": None, "parallel_tool_calls": None}
    (example,) = read_examples([json.dumps(line).encode()])
    assert example.messages == [USER, ANSWER]
    assert example.tools is None

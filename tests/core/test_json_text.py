"""JSON that is refused, each with half a sentence that says why."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.json_text import MAX_DEPTH, JsonError, parse_json

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(VALUES, st.booleans())
def test_every_json_value_comes_back_as_it_was(value: object, ascii_only: bool) -> None:
    assert parse_json(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@given(st.binary(max_size=60))
def test_any_bytes_give_a_value_or_a_json_error(data: bytes) -> None:
    try:
        value = parse_json(data)
    except JsonError as error:
        assert str(error)
    else:
        assert not (isinstance(value, float) and not math.isfinite(value))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON at character 2"),
        ("{'a': 1}", "not valid JSON"),
        ('{"a": 1} {}', "not valid JSON at character 10"),
        ('{"a": NaN}', "NaN is not JSON"),
        ("[Infinity]", "Infinity is not JSON"),
        ("[-Infinity]", "-Infinity is not JSON"),
        ("1e999", "too large"),
        ("-1e999", "too large"),
        ('{"a": 1, "a": 2}', "duplicate key 'a'"),
        ('{"x": [{"b": 1, "c": 2, "b": 1}]}', "duplicate key 'b'"),
        ("9" * 5000, "too many digits"),
        ('"\\ud83d"', "lone surrogate"),
        ('{"\\udc00": 1}', "lone surrogate"),
        ("[" * 100_000, "nested deeper"),
        ("[" * 100_000 + "]" * 100_000, "nested deeper"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested deeper"),
        ('"a\nb"', "not valid JSON"),
        ("\ufeff{}", "not valid JSON"),
    ],
    ids=lambda value: value[:24],
)
def test_what_other_parsers_let_through_is_refused(text: str, words: str) -> None:
    with pytest.raises(JsonError, match=words.replace("(", r"\(")):
        parse_json(text)


def test_bytes_that_are_not_utf8_are_refused_with_their_place() -> None:
    with pytest.raises(JsonError, match="not valid UTF-8 at byte 3"):
        parse_json(b'"a\xff"')


def test_nesting_is_allowed_up_to_the_limit() -> None:
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH) is not None
    with pytest.raises(JsonError, match="nested deeper"):
        parse_json("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1))


def test_whole_surrogate_pairs_nul_and_line_separators_are_text() -> None:
    assert parse_json('"\\ud83d\\ude00 \\u0000 \u2028 \x85"') == "\N{GRINNING FACE} \0 \u2028 \x85"


def test_an_escaped_backslash_before_ud83d_is_not_a_surrogate() -> None:
    assert parse_json(r'"\\ud83d"') == "\\ud83d"

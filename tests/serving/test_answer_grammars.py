"""What the API lets an answer say, tried with the tokens of a model: the grammar is the promise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.api.formats import read_format, read_offer, use_tools
from app.api.grammars import MAX_PROPERTIES, make_grammar
from app.core.errors import InvalidRequest
from worker.base_model import load_tokenizer
from worker.serving.grammar import Grammars
from worker.serving.vocabulary import make_vocabulary

Accepts = Callable[[str | None, str], bool]
WEATHER = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"city": {"enum": ["Paris", "Rome"]}},
}


@pytest.fixture(scope="module")
def accepts(tiny_dir: Path) -> Accepts:
    """Whether a whole answer keeps to a grammar."""
    tokenizer = load_tokenizer(tiny_dir)
    vocabulary = make_vocabulary(tokenizer, size=len(tokenizer), end_ids=frozenset({2}))
    grammars = Grammars(vocabulary)

    def accept(grammar: str | None, text: str) -> bool:
        assert grammar is not None
        matcher = grammars.compile(grammar).deep_copy()
        tokens = vocabulary.tokenize_str(text)
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

    return accept


def tool(name: str, *, strict: bool | None = None, **parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "strict": strict, "parameters": parameters}}


def grammar(
    *tools: dict[str, Any], choice: Any = None, parallel: bool | None = None, format: Any = None
) -> str | None:
    use = use_tools(read_offer(list(tools), choice, parallel=parallel), model="m", format="hermes")
    return make_grammar(read_format(format), use.calls if use else None)


def json_schema(schema: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, **fields}}


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def test_a_json_object_is_one_whatever_is_in_it(accepts: Accepts) -> None:
    rules = grammar(format={"type": "json_object"})
    for text in ('{"a": [1, null, {"b": "ü"}]}', '{"a":1}', '{\n    "a": 1\n}', "{}"):
        assert accepts(rules, text), text
    for text in ("[1]", '"a"', "{", 'Here: {"a": 1}', '{"a": 1} and more', "{" + " " * 40 + "}"):
        assert not accepts(rules, text), text


@pytest.mark.parametrize("strict", [True, False, None])
def test_a_schema_is_kept_to(accepts: Accepts, strict: bool | None) -> None:
    rules = grammar(format=json_schema(WEATHER, strict=strict))
    assert accepts(rules, '{"city": "Rome", "days": 3}')
    for text in ('{"city": "Oslo", "days": 3}', '{"city": "Rome"}', '{"city": "Rome", "days": 3, "x": 1}'):
        assert not accepts(rules, text), text


def test_free_text_needs_no_grammar() -> None:
    assert grammar(format={"type": "text"}) is None
    assert grammar(tool("f"), choice="auto") is None
    assert grammar(tool("f", strict=True, **WEATHER), choice="none") is None


def test_a_required_call_is_one_of_the_functions_with_arguments_that_fit(accepts: Accepts) -> None:
    rules = grammar(tool("weather", **WEATHER), tool("free"), choice="required")
    good = call("weather", '{"city": "Rome", "days": 3}')
    assert accepts(rules, good)
    assert accepts(rules, f"{good}\n{call('free', '{}')}")
    for text in ("Hello", call("weather", "{}"), call("other", "{}"), good + " so"):
        assert not accepts(rules, text), text


def test_a_named_function_is_the_one_that_is_called(accepts: Accepts) -> None:
    choice = {"type": "function", "function": {"name": "b"}}
    rules = grammar(tool("a"), tool("b"), choice=choice, parallel=False)
    assert accepts(rules, call("b", "{}"))
    assert not accepts(rules, call("a", "{}"))
    assert not accepts(rules, call("b", "{}") + "\n" + call("b", "{}"))


def test_of_allowed_tools_only_those_are_shown_and_called(accepts: Accepts) -> None:
    named = [{"type": "function", "function": {"name": "b"}}]
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": named}}
    use = use_tools(read_offer([tool("a"), tool("b")], choice, parallel=None), model="m", format="hermes")
    assert use is not None
    assert [one["function"]["name"] for one in use.shown] == ["b"]
    assert not accepts(make_grammar(None, use.calls), call("a", "{}"))


def test_strict_functions_hold_a_free_answer_to_their_schemas_once_it_calls(accepts: Accepts) -> None:
    rules = grammar(tool("weather", strict=True, **WEATHER), choice="auto")
    good = call("weather", '{"city": "Rome", "days": 3}')
    for text in ("Hello <b>there</b>", "", good, f"I look.\n{good}", f"{good}\n{good}\n"):
        assert accepts(rules, text), text
    for text in (call("weather", '{"city": "Rome"}'), f"I look.\n{call('other', '{}')}"):
        assert not accepts(rules, text), text


def test_without_parallel_calls_the_first_one_is_the_last(accepts: Accepts) -> None:
    rules = grammar(tool("f"), parallel=False)
    one = call("f", "{}")
    assert accepts(rules, "Hello")
    assert accepts(rules, f"Well: {one}")
    assert not accepts(rules, f"{one}\n{one}")


def test_a_format_and_tools_give_a_call_or_the_format(accepts: Accepts) -> None:
    rules = grammar(tool("f"), format=json_schema(WEATHER))
    assert accepts(rules, call("f", "{}"))
    assert accepts(rules, '{"city": "Rome", "days": 3}')
    assert not accepts(rules, "Hello")


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


def inside(schema: dict[str, Any]) -> dict[str, Any]:
    """A strict object with one property of this schema."""
    return {
        "type": "object",
        "properties": {"a": schema},
        "required": ["a"],
        "additionalProperties": False,
    }


CANNOT: dict[str, tuple[Any, str]] = {
    "an unknown type": ({"type": "text"}, "type"),
    "an unknown keyword": ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    "a reference to nothing": ({"$ref": "#/$defs/x"}, "does not exist"),
    "a reference elsewhere": ({"$ref": "http://127.0.0.1/x"}, ""),
    "a look-ahead": ({"type": "string", "pattern": "(?=a)"}, "look-around"),
    "too deep": (nested(80), "deeper than 64"),
    "too wide": ({"properties": {f"p{i}": {} for i in range(MAX_PROPERTIES + 1)}}, "500 properties"),
    "too large": ({"enum": ["x" * 70_000]}, "larger than"),
    "too many ways": (
        {
            "allOf": [
                {"anyOf": [{"properties": {f"a{i}": {"type": "string"}}} for i in range(20)]}
                for _ in range(8)
            ]
        },
        "too large",
    ),
}


@pytest.mark.parametrize("case", CANNOT)
def test_a_schema_that_cannot_be_kept_to_is_refused_with_its_reason(case: str) -> None:
    schema, says = CANNOT[case]
    with pytest.raises(InvalidRequest) as caught:
        grammar(format=json_schema(inside(schema)))
    assert (caught.value.code, caught.value.param) == ("invalid_json_schema", "response_format")
    assert says in caught.value.message
    assert "\n" not in caught.value.message


def test_a_strict_schema_must_be_of_the_strict_subset() -> None:
    inner = {"type": "object", "properties": {"b": {"type": "string"}}, "additionalProperties": False}
    outer = inside(inner)
    with pytest.raises(InvalidRequest, match=r"in context=\('properties', 'a'\), 'required' .* Missing 'b'"):
        grammar(format=json_schema(outer, strict=True))
    assert grammar(format=json_schema(outer)) is not None
    with pytest.raises(InvalidRequest, match="'additionalProperties' is required"):
        grammar(tool("f", strict=True, type="object", properties={}))
    assert grammar(format=json_schema({**outer, "properties": {"a": {"properties": {}}}})) is not None


def test_options_of_the_library_are_ours_to_set() -> None:
    with pytest.raises(InvalidRequest, match="'x-guidance' is not supported"):
        grammar(format=json_schema({**inside({}), "x-guidance": {"lenient": True}}))


def test_a_tools_schema_is_named_where_it_stands() -> None:
    with pytest.raises(InvalidRequest) as caught:
        grammar(tool("a"), tool("b", type="text"), choice="required")
    assert caught.value.param == "tools[1].function.parameters"
    assert caught.value.code == "invalid_function_parameters"


def test_an_unknown_keyword_of_a_function_that_is_not_strict_is_passed_over(accepts: Accepts) -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "string", "format": "city-name"}}}
    assert accepts(grammar(tool("f", **parameters), choice="required"), call("f", json.dumps({"a": "Rome"})))

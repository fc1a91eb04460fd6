"""Grammars of answers: what a response format or a choice of tools lets a model say, checked at the door.

The text is in llguidance's language; the worker compiles it again with the tokens of its model. Compiling
here takes no tokens and no torch, and refuses a schema that could not be kept to. Knows no requests.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from llguidance import LLMatcher, LLParserLimits

from app.core.errors import InvalidRequest
from app.core.tool_calls import CLOSE, OPEN

MAX_SCHEMA_BYTES = 64 * 1024  # of one schema, as JSON
MAX_GRAMMAR_BYTES = 256 * 1024  # of all a request asks for
MAX_DEPTH = 64  # arrays and objects within each other, in the schema's own text
MAX_PROPERTIES = 500  # of one schema; compiling takes 0.1 s at this size and grows with the square
# Bounded, or a model could fill its answer with blanks; enough for indented JSON.
WHITE_SPACE = r"[ \n\t]{0,32}"
_SETTINGS = "x-guidance"  # key under which the library takes options: ours to set, not the client's
_CHECKED = 256  # grammars remembered as good


@dataclass(frozen=True, slots=True)
class Schema:
    """A JSON schema a client gave; `param` is where it stands, `code` what its faults are called.

    `strict`: of OpenAI's strict subset. `lenient`: keywords that nobody knows are passed over.
    """

    schema: Mapping[str, Any]
    strict: bool
    param: str
    code: str
    lenient: bool = False

    def rule(self) -> str:
        """The schema in the grammar's language."""
        options = {"whitespace_pattern": WHITE_SPACE, "lenient": self.lenient}
        return "%json " + json.dumps({**self.schema, _SETTINGS: options}, ensure_ascii=True)

    def fault(self, why: str) -> InvalidRequest:
        """The refusal that says what is wrong with it."""
        return InvalidRequest(f"Invalid schema for '{self.param}': {why}.", code=self.code, param=self.param)


@dataclass(frozen=True, slots=True)
class Calls:
    """Functions a model may call, by name. `required`: it must. `parallel`: several times."""

    functions: Mapping[str, Schema]
    required: bool
    parallel: bool

    @property
    def constrained(self) -> bool:
        """Something about the calls must be held to that the model could get wrong."""
        return self.required or not self.parallel or any(s.strict for s in self.functions.values())


JSON_OBJECT = Schema({"type": "object"}, False, "response_format", "invalid_json_schema")


def make_grammar(body: Schema | None, calls: Calls | None) -> str | None:
    """The grammar of an answer, checked; None where it may be anything. Raises InvalidRequest."""
    if body is not None:
        check_schema(body)
    if calls is not None:
        for schema in calls.functions.values():
            check_schema(schema)
    grammar = "\n".join(_rules(body, calls))
    if not grammar:
        return None
    param = "tools" if body is None or calls else body.param
    if len(grammar) > MAX_GRAMMAR_BYTES:
        text = f"The schemas of this request come to more than {MAX_GRAMMAR_BYTES} bytes."
        raise InvalidRequest(text, code="invalid_value", param=param)
    if why := _compile(grammar):
        text = f"The schemas of this request cannot be kept to together: {why}."
        raise InvalidRequest(text, code="invalid_value", param=param)
    return grammar


def check_schema(schema: Schema) -> None:
    """Raise InvalidRequest for one too large, outside the strict subset when strict, or not understood."""
    if _SETTINGS in schema.schema:
        raise schema.fault(f"the keyword '{_SETTINGS}' is not supported")
    properties = 0
    for _, node, depth in _walk(schema.schema):
        if depth > MAX_DEPTH:
            raise schema.fault(f"it is nested deeper than {MAX_DEPTH} levels")
        if isinstance(node.get("properties"), dict):
            properties += len(node["properties"])
    if properties > MAX_PROPERTIES:
        raise schema.fault(f"it has more than {MAX_PROPERTIES} properties")
    for path, node, _ in _walk(schema.schema) if schema.strict else ():
        if why := _outside_subset(node):
            raise schema.fault(f"in context=({', '.join(map(repr, path))}), {why}")
    rule = schema.rule()
    if len(rule) > MAX_SCHEMA_BYTES:
        raise schema.fault(f"it is larger than {MAX_SCHEMA_BYTES} bytes")
    if why := _compile(f"start: {rule}"):
        raise schema.fault(why)


def fits_subset(schema: Mapping[str, Any]) -> bool:
    """Whether a schema lies in OpenAI's strict subset as it stands."""
    return not any(_outside_subset(node) for _, node, _ in _walk(schema))


def _outside_subset(node: Mapping[str, Any]) -> str | None:
    """What of OpenAI's strict subset an object schema misses."""
    if node.get("type") != "object" and "properties" not in node:
        return None
    if node.get("additionalProperties") is not False:
        return "'additionalProperties' is required to be supplied and to be false"
    properties, required = node.get("properties", {}), node.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        return None  # the compiler says what is wrong
    missing = [name for name in properties if name not in required]
    if missing:
        name = missing[0][:64]
        return f"'required' must be an array including every key in properties. Missing {name!r}"
    return None


def _walk(schema: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any], int]]:
    """All objects that can be schemas, with their path and depth; no recursion, as depth is the client's."""
    stack: list[tuple[tuple[str, ...], Any, int, bool]] = [((), schema, 0, True)]
    while stack:
        path, value, depth, is_schema = stack.pop()
        if depth > MAX_DEPTH + 1:
            continue
        if isinstance(value, list):
            stack += [((*path, str(i)), item, depth + 1, is_schema) for i, item in enumerate(value)]
        elif isinstance(value, dict):
            yield path, value if is_schema else {}, depth
            for key, item in value.items():
                if is_schema and key in ("const", "enum", "default", "examples"):
                    continue  # values, not schemas
                names = is_schema and key in ("properties", "$defs", "definitions", "patternProperties")
                stack.append(((*path, key), item, depth + 1, not names))


def _rules(body: Schema | None, calls: Calls | None) -> Iterator[str]:
    if calls is None or (body is None and not calls.constrained):
        if body is not None:
            yield f"start: {body.rule()}"
        return
    free = body is None and not calls.required  # any text, and calls in it
    if free:
        yield "start: tag* TEXT" if calls.parallel else "start: tag | TEXT"
        yield r"TEXT: /(.|\n)*/"
        yield f"begin[lazy]: TEXT {json.dumps(OPEN)}"
        yield "tag: begin call"
    else:
        more = '("\\n" tag)*' if calls.parallel else ""
        yield f"start: tag {more}" + ("" if body is None else " | body")
        yield f"tag: {json.dumps(OPEN)} call"
        if body is not None:
            yield f"body: {body.rule()}"
    yield "call: " + " | ".join(f"call_{number}" for number in range(len(calls.functions)))
    for number, (name, schema) in enumerate(calls.functions.items()):
        head = json.dumps(f'\n{{"name": "{name}", "arguments": ')
        yield f"call_{number}: {head} arguments_{number} {json.dumps('}' + chr(10) + CLOSE)}"
        yield f"arguments_{number}: {schema.rule()}"


@lru_cache(maxsize=_CHECKED)
def _compile(grammar: str) -> str:
    """What is wrong with a grammar, in one line; empty when nothing is."""
    limits = LLParserLimits(max_grammar_size=200_000, verbose_errors=False)
    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, limits=limits)
    return _reason(messages) if failed else ""


def _reason(messages: Sequence[str]) -> str:
    """The library's reason in one line, without the place in a text that the client never wrote."""
    lines = messages[0].splitlines() if messages else []
    named = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]  # of a pattern
    line = (named or lines or ["it cannot be compiled"])[0]
    return line.rpartition("failed to compile JSON schema: ")[2][:200].rstrip(".")

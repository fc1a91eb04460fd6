"""Response formats and choices of tools, from the client's words to what a grammar is made of."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from app.api.faults import kind_of, shown
from app.api.grammars import JSON_OBJECT, Calls, Schema
from app.core.errors import InvalidRequest

_FORMAT_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_FORMATS = ("text", "json_object", "json_schema")
_ANYTHING: dict[str, Any] = {"type": "object"}  # of a function that says nothing of its parameters


@dataclass(frozen=True, slots=True)
class Offer:
    """Tools in the shape of chat, and how they may be called: `mode` is none, auto or required, `wanted` the
    names to choose from (None: all). `inside`: where in a tool of the request its function stands."""

    tools: list[dict[str, Any]]
    mode: str
    wanted: set[str] | None
    parallel: bool
    inside: str = ".function"


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools shown to the model, and how it may call them."""

    shown: list[dict[str, Any]]
    calls: Calls


def read_format(value: Any, *, param: str = "response_format") -> Schema | None:
    """What the answer must be; None: any text. Raises InvalidRequest."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise wrong_type(param, "an object", value)
    kind = value.get("type")
    if kind not in _FORMATS:
        text = f"Invalid value for '{param}.type': {shown(kind)!r}. Supported values are: "
        raise invalid(text + ", ".join(f"'{name}'" for name in _FORMATS) + ".", f"{param}.type")
    refuse_unknown(value, {"type", "json_schema"} if kind == "json_schema" else {"type"}, param)
    if kind == "text":
        return None
    return JSON_OBJECT if kind == "json_object" else _read_schema(value.get("json_schema"), param)


def _read_schema(value: Any, param: str) -> Schema:
    """`{name, schema, strict?, description?}`, as chat has it."""
    where = f"{param}.json_schema"
    if not isinstance(value, dict):
        raise wrong_type(where, "an object", value)
    return read_named_schema(value, where=where, param=param)


def read_named_schema(value: dict[str, Any], *, where: str, param: str) -> Schema:
    """The schema of an object that names it. Raises InvalidRequest."""
    refuse_unknown(value, {"name", "schema", "strict", "description"}, where)
    name = value.get("name")
    if not isinstance(name, str) or not _FORMAT_NAME.fullmatch(name):
        raise invalid(f"'{where}.name' must be 1 to 64 letters, digits, '_' or '-'.", f"{where}.name")
    schema, strict = value.get("schema"), value.get("strict")
    if not isinstance(schema, dict):
        raise wrong_type(f"{where}.schema", "an object", schema)
    if strict is not None and not isinstance(strict, bool):
        raise wrong_type(f"{where}.strict", "true or false", strict)
    if strict and schema.get("type") != "object":
        raise invalid(f"The root of '{where}.schema' must be of type 'object'.", param, "invalid_json_schema")
    return Schema(schema, bool(strict), param, "invalid_json_schema")


def read_offer(tools: list[dict[str, Any]] | None, choice: Any, *, parallel: bool | None) -> Offer:
    """The tools of a chat request and how they may be called. Raises InvalidRequest.

    `tools` are well formed (`check_tools`).
    """
    tools = tools or []
    mode, wanted = _read_choice(choice, "auto" if tools else "none")
    return Offer(tools, mode, wanted, parallel is not False)


def use_tools(offer: Offer, *, model: str, format: str | None) -> ToolUse | None:
    """How `model`, which writes calls in `format`, may call tools; None: not at all. Raises InvalidRequest.

    Those that a choice of allowed tools leaves out are not shown.
    """
    mode, wanted = offer.mode, offer.wanted
    if not offer.tools and (wanted or mode == "required"):
        raise invalid("'tool_choice' is only allowed when 'tools' are specified.", "tool_choice")
    if mode == "none" or not offer.tools:
        return None
    if format is None:
        text = f"The model '{model}' cannot call tools: its catalogue entry has no tool_format. "
        raise InvalidRequest(text + "Leave 'tools' out.", code="unsupported_parameter", param="tools")
    functions: dict[str, Schema] = {}
    kept = []
    for number, tool in enumerate(offer.tools):
        function = tool["function"]
        if wanted is not None and function["name"] not in wanted:
            continue
        kept.append(tool)
        param = f"tools[{number}]{offer.inside}.parameters"
        schema, strict = function.get("parameters") or _ANYTHING, function.get("strict") is True
        functions[function["name"]] = Schema(
            schema, strict, param, "invalid_function_parameters", lenient=not strict
        )
    if missing := (wanted or set()) - functions.keys():
        text = f"Invalid 'tool_choice': no function {shown(min(missing))!r} is specified in 'tools'."
        raise invalid(text, "tool_choice")
    return ToolUse(kept, Calls(functions, mode == "required", offer.parallel))


def _read_choice(choice: Any, default: str) -> tuple[str, set[str] | None]:
    """How calls are chosen (`none`, `auto`, `required`), and among which names; None: all."""
    if choice is None:
        return default, None
    if choice in ("none", "auto", "required"):
        return choice, None
    kind = choice.get("type") if isinstance(choice, dict) else None
    if kind == "function":
        return "required", {_function_name(choice, "tool_choice")}
    if kind == "allowed_tools":
        allowed = choice.get("allowed_tools")
        mode = allowed.get("mode") if isinstance(allowed, dict) else None
        tools = allowed.get("tools") if isinstance(allowed, dict) else None
        if mode in ("auto", "required") and isinstance(tools, list) and tools:
            return mode, {
                _function_name(t, f"tool_choice.allowed_tools.tools[{i}]") for i, t in enumerate(tools)
            }
    text = (
        "Invalid 'tool_choice': expected 'none', 'auto', 'required', {\"type\": \"function\", \"function\": "
        '{"name": …}} or {"type": "allowed_tools", "allowed_tools": {"mode": …, "tools": […]}}.'
    )
    raise invalid(text, "tool_choice")


def _function_name(value: Any, where: str) -> str:
    function = value.get("function") if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise invalid(f"'{where}.function.name' must be the name of a function in 'tools'.", "tool_choice")
    return name


def refuse_unknown(value: dict[str, Any], known: set[str], where: str) -> None:
    """Raise for the first key that is not known."""
    for key in value:
        if key not in known:
            path = f"{where}.{shown(key)}"
            raise InvalidRequest(f"Unknown parameter: '{path}'.", code="unknown_parameter", param=path)


def wrong_type(where: str, wanted: str, got: object) -> InvalidRequest:
    """The refusal of a value of another type."""
    text = f"Invalid type for '{where}': expected {wanted}, but got {kind_of(got)} instead."
    return InvalidRequest(text, code="invalid_type", param=where)


def invalid(text: str, param: str, code: str = "invalid_value") -> InvalidRequest:
    """A refusal in these words."""
    return InvalidRequest(text, code=code, param=param)

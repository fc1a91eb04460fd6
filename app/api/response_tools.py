"""Tools, their choice and the format of text as the Responses API spells them: flat, where chat nests."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from app.api.faults import shown
from app.api.formats import Offer, invalid, read_named_schema, refuse_unknown, wrong_type
from app.api.grammars import JSON_OBJECT, Schema, fits_subset
from app.core.errors import InvalidRequest
from app.core.messages import MAX_TOOLS

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_FORMAT = "text.format"
_FORMATS = ("text", "json_object", "json_schema")


def read_tools(value: Any) -> list[dict[str, Any]]:
    """Function tools, whole: what was left out is filled in. Raises InvalidRequest."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise wrong_type("tools", "an array", value)
    if len(value) > MAX_TOOLS:
        text = f"Invalid 'tools': array too long. Expected at most {MAX_TOOLS} items."
        raise invalid(text, "tools", "array_above_max_length")
    return [_read_tool(tool, f"tools[{number}]") for number, tool in enumerate(value)]


def _read_tool(tool: Any, where: str) -> dict[str, Any]:
    if not isinstance(tool, dict):
        raise wrong_type(where, "an object", tool)
    kind = tool.get("type")
    if kind != "function":
        raise InvalidRequest(
            f"'{where}' of type {shown(kind)!r} is not supported here; only 'function' is.",
            code="unsupported_parameter",
            param=f"{where}.type",
        )
    refuse_unknown(tool, {"type", "name", "description", "parameters", "strict"}, where)
    name, parameters = tool.get("name"), tool.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise invalid(f"'{where}.name' must be 1 to 64 letters, digits, '_' or '-'.", f"{where}.name")
    for key, type_, words in (
        ("description", str, "a string"),
        ("parameters", dict, "an object"),
        ("strict", bool, "true or false"),
    ):
        if tool.get(key) is not None and not isinstance(tool[key], type_):
            raise wrong_type(f"{where}.{key}", words, tool[key])
    strict = tool.get("strict")
    if strict is None:  # OpenAI's default is true; a schema that cannot be strict as it stands is not
        strict = parameters is not None and fits_subset(parameters)
    return {
        "type": "function",
        "name": name,
        "description": tool.get("description"),
        "parameters": parameters,
        "strict": strict,
    }


def read_offer(tools: list[dict[str, Any]], choice: Any, *, parallel: bool | None) -> Offer:
    """Tools of `read_tools` in the shape of chat, and how they may be called. Raises InvalidRequest."""
    nested = [{"type": "function", "function": _function(tool)} for tool in tools]
    mode, wanted = _read_choice(choice, "auto" if tools else "none")
    return Offer(nested, mode, wanted, parallel is not False, inside="")


def _function(tool: dict[str, Any]) -> dict[str, Any]:
    return {
        key: tool[key] for key in ("name", "description", "parameters", "strict") if tool[key] is not None
    }


def _read_choice(choice: Any, default: str) -> tuple[str, set[str] | None]:
    if choice is None:
        return default, None
    if choice in ("none", "auto", "required"):
        return choice, None
    kind = choice.get("type") if isinstance(choice, dict) else None
    if kind == "function":
        return "required", {_chosen(choice, "tool_choice")}
    if kind == "allowed_tools":
        mode, tools = choice.get("mode"), choice.get("tools")
        if mode in ("auto", "required") and isinstance(tools, list) and tools:
            return mode, {_chosen(tool, f"tool_choice.tools[{i}]") for i, tool in enumerate(tools)}
    text = (
        "Invalid 'tool_choice': expected 'none', 'auto', 'required', {\"type\": \"function\", \"name\": …} "
        'or {"type": "allowed_tools", "mode": …, "tools": […]}.'
    )
    raise invalid(text, "tool_choice")


def _chosen(value: Any, where: str) -> str:
    if not isinstance(value, dict) or value.get("type") != "function":
        raise invalid(f"'{where}' must be of type 'function'.", "tool_choice")
    name = value.get("name")
    if not isinstance(name, str):
        raise invalid(f"'{where}.name' must be the name of a function in 'tools'.", "tool_choice")
    return name


def read_format(value: Any) -> Schema | None:
    """What `text.format` asks of the text; None: nothing. Raises InvalidRequest."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise wrong_type(_FORMAT, "an object", value)
    kind = value.get("type")
    if kind not in _FORMATS:
        text = f"Invalid value for '{_FORMAT}.type': {shown(kind)!r}. Supported values are: "
        raise invalid(text + ", ".join(f"'{name}'" for name in _FORMATS) + ".", f"{_FORMAT}.type")
    named = {key: item for key, item in value.items() if key != "type"}
    if kind == "json_schema":
        return read_named_schema(named, where=_FORMAT, param=_FORMAT)
    refuse_unknown(named, set(), _FORMAT)
    return replace(JSON_OBJECT, param=_FORMAT) if kind == "json_object" else None

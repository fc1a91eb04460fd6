"""Turns what pydantic found wrong into OpenAI's words: one sentence, a code, the path of the field.

Knows neither HTTP nor any one request. A validator of ours raises PydanticCustomError with an OpenAI code
as its type and a whole sentence as its text; both pass through unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from app.core.errors import InvalidRequest

CODES = frozenset(
    {
        "missing_required_parameter",
        "unknown_parameter",
        "unsupported_parameter",
        "unsupported_value",
        "invalid_type",
        "invalid_value",
        "integer_below_min_value",
        "integer_above_max_value",
        "decimal_below_min_value",
        "decimal_above_max_value",
        "string_below_min_length",
        "string_above_max_length",
        "array_above_max_length",
        "object_above_max_properties",
        "empty_array",
    }
)
_EXPECTED = {
    "int": "an integer",
    "float": "a number",
    "finite": "a number",
    "string": "a string",
    "bool": "true or false",
    "list": "an array",
    "dict": "an object",
    "model": "an object",
}
_BOUNDS = {
    "greater_than_equal": ("below_min_value", "below minimum value", ">=", "ge"),
    "greater_than": ("below_min_value", "below minimum value", ">", "gt"),
    "less_than_equal": ("above_max_value", "above maximum value", "<=", "le"),
    "less_than": ("above_max_value", "above maximum value", "<", "lt"),
}


def to_invalid_request(errors: Sequence[Mapping[str, Any]], *, inside: str = "") -> InvalidRequest:
    """The first of pydantic's errors, as a client should read it. `inside`: where FastAPI found it."""
    first = errors[0]
    loc = tuple(first["loc"])
    param = path_of(loc[1:] if inside and loc and loc[0] == inside else loc)
    code, message = _explain(first, param)
    return InvalidRequest(message, code=code, param=param or None)


def path_of(loc: Sequence[str | int]) -> str:
    """`("messages", 2, "role")` → `messages[2].role`; keys from users are cut to a bearable length."""
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            path += ("." if path else "") + shown(part)
    return path


def shown(value: object, *, length: int = 80) -> str:
    """A value of the client's, fit for a sentence."""
    text = value if isinstance(value, str) else repr(value)
    return "".join(c if c.isprintable() else "�" for c in text[:length])


def kind_of(value: object) -> str:
    """What a JSON value is, in words."""
    kinds: list[tuple[type, str]] = [(bool, "a boolean"), (int, "an integer"), (float, "a number")]
    kinds += [(str, "a string"), (list, "an array"), (dict, "an object")]
    return next((words for kind, words in kinds if isinstance(value, kind)), "null")


def _explain(error: Mapping[str, Any], param: str) -> tuple[str, str]:
    kind, ctx = error["type"], error.get("ctx", {})
    if kind in CODES:
        return kind, error["msg"]
    if kind == "missing":
        return "missing_required_parameter", f"Missing required parameter: '{param}'."
    if kind == "extra_forbidden":
        return "unknown_parameter", f"Unknown parameter: '{param}'."
    if kind in _BOUNDS:
        return _out_of_bounds(kind, ctx, error.get("input"), param)
    if kind in ("string_too_long", "string_too_short", "too_long", "too_short"):
        return _wrong_length(kind, ctx, param)
    if kind in ("literal_error", "enum"):
        text = f"Invalid value for '{param}': {shown(error.get('input'))!r}. Supported values are: "
        return "invalid_value", text + f"{ctx.get('expected', '')}."
    if kind.endswith(("_type", "_parsing", "int_from_float", "parsing_size")):
        wanted = _EXPECTED.get(kind.split("_")[0], "another type")
        got = kind_of(error.get("input"))
        return "invalid_type", f"Invalid type for '{param}': expected {wanted}, but got {got} instead."
    return "invalid_value", f"Invalid value for '{param}': {error['msg']}."


def _out_of_bounds(kind: str, ctx: Mapping[str, Any], value: object, param: str) -> tuple[str, str]:
    code, words, sign, key = _BOUNDS[kind]
    bound = ctx[key]
    number = "decimal" if isinstance(bound, float) else "integer"
    limit = f"{bound:g}" if isinstance(bound, float) else bound
    expected = f"Expected a value {sign} {limit}, but got {shown(value)} instead."
    return f"{number}_{code}", f"Invalid '{param}': {number} {words}. {expected}"


def _wrong_length(kind: str, ctx: Mapping[str, Any], param: str) -> tuple[str, str]:
    if kind == "string_too_long":
        text = f"Invalid '{param}': string too long. Expected at most {ctx['max_length']} characters."
        return "string_above_max_length", text
    if kind == "string_too_short":
        text = f"Invalid '{param}': string too short. Expected at least {ctx['min_length']} characters."
        return "string_below_min_length", text
    if kind == "too_long":
        text = f"Invalid '{param}': array too long. Expected at most {ctx['max_length']} items."
        return "array_above_max_length", text
    return "empty_array", f"Invalid '{param}': empty array. Expected at least {ctx['min_length']} item."

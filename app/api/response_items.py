"""Items of the Responses API: a client's input checked and made whole, and the conversation they spell.

An item is stored and listed in the shape it has here. Knows neither HTTP nor how an answer comes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from app.api.faults import kind_of, shown
from app.api.formats import invalid, refuse_unknown, wrong_type
from app.core.errors import InvalidRequest
from app.core.ids import Prefix, new_id
from app.core.messages import MessageError, check_messages

Item = dict[str, Any]
_ROLES = ("user", "assistant", "system", "developer")
_STATUS = {"id", "status", "type"}  # what a client may send back and nothing is made of


def read_items(value: Any) -> list[Item]:
    """The input as whole items with fresh ids. Raises InvalidRequest."""
    if isinstance(value, str):
        return [_message({"role": "user", "content": value}, "input")]
    if value is None:
        text = "Missing required parameter: 'input'."
        raise InvalidRequest(text, code="missing_required_parameter", param="input")
    if not isinstance(value, list):
        raise wrong_type("input", "a string or an array of items", value)
    if not value:
        raise InvalidRequest(
            "Invalid 'input': empty array. Expected at least 1 item.", code="empty_array", param="input"
        )
    return [_read_item(item, f"input[{number}]") for number, item in enumerate(value)]


def _read_item(item: Any, where: str) -> Item:
    if not isinstance(item, dict):
        raise wrong_type(where, "an object", item)
    kind = item.get("type", "message" if "role" in item else None)
    reader = _READERS.get(kind) if isinstance(kind, str) else None
    if reader is None:
        text = f"Invalid value for '{where}.type': {shown(kind)!r}. Supported values are: "
        raise invalid(text + ", ".join(f"'{name}'" for name in _READERS) + ".", f"{where}.type")
    return reader({key: value for key, value in item.items() if value is not None}, where)


def _message(item: Mapping[str, Any], where: str) -> Item:
    refuse_unknown(dict(item), _STATUS | {"role", "content", "phase"}, where)
    role = item.get("role")
    if role not in _ROLES:
        roles = ", ".join(f"'{name}'" for name in _ROLES)
        raise invalid(
            f"Invalid value for '{where}.role': {shown(role)!r}. Supported values are: {roles}.",
            f"{where}.role",
        )
    made_up = "output_text" if role == "assistant" else "input_text"
    content = _read_parts(item.get("content"), f"{where}.content", kind=made_up)
    id = new_id(Prefix.MESSAGE)
    return {"id": id, "type": "message", "role": role, "status": "completed", "content": content}


def _read_parts(content: Any, where: str, *, kind: str) -> list[Item]:
    """A text, or a list of texts, as parts of one kind."""
    if isinstance(content, str):
        return [text_part(content, kind=kind)]
    if not isinstance(content, list) or not content:
        raise wrong_type(where, "a string or an array of text parts", content)
    return [_read_part(part, f"{where}[{number}]", kind=kind) for number, part in enumerate(content)]


def _read_part(part: Any, where: str, *, kind: str) -> Item:
    if not isinstance(part, dict):
        raise wrong_type(where, "an object", part)
    given = part.get("type")
    key = "refusal" if given == "refusal" else "text"
    if given not in ("input_text", "output_text", "refusal"):
        raise InvalidRequest(
            f"'{where}' of type {shown(given)!r} is not supported here; only text is.",
            code="unsupported_parameter",
            param=f"{where}.type",
        )
    if not isinstance(part.get(key), str):
        raise wrong_type(f"{where}.{key}", "a string", part.get(key))
    return text_part(part[key], kind=kind)


def text_part(text: str, *, kind: str = "output_text", logprobs: Sequence[Any] = ()) -> Item:
    """A piece of text in a message."""
    if kind == "input_text":
        return {"type": kind, "text": text}
    return {"type": kind, "text": text, "annotations": [], "logprobs": list(logprobs)}


def _function_call(item: Mapping[str, Any], where: str) -> Item:
    refuse_unknown(dict(item), _STATUS | {"call_id", "name", "arguments"}, where)
    said = {key: _text(item, key, where) for key in ("call_id", "name", "arguments")}
    return {"id": new_id(Prefix.FUNCTION_CALL), "type": "function_call", "status": "completed", **said}


def _function_call_output(item: Mapping[str, Any], where: str) -> Item:
    refuse_unknown(dict(item), _STATUS | {"call_id", "output"}, where)
    output = item.get("output")
    if not isinstance(output, str):
        output = _read_parts(output, f"{where}.output", kind="input_text")
    return {
        "id": new_id(Prefix.FUNCTION_CALL_OUTPUT),
        "type": "function_call_output",
        "status": "completed",
        "call_id": _text(item, "call_id", where),
        "output": output,
    }


def _text(item: Mapping[str, Any], key: str, where: str) -> str:
    value = item.get(key)
    if not isinstance(value, str):
        text = f"Invalid type for '{where}.{key}': expected a string, but got {kind_of(value)} instead."
        raise InvalidRequest(text, code="invalid_type", param=f"{where}.{key}")
    return value


_READERS: dict[str, Callable[[Mapping[str, Any], str], Item]] = {
    "message": _message,
    "function_call": _function_call,
    "function_call_output": _function_call_output,
}


def to_messages(instructions: str | None, past: Sequence[Item], own: Sequence[Item]) -> list[dict[str, Any]]:
    """The conversation in the shape of chat, checked. Raises InvalidRequest."""
    messages: list[dict[str, Any]] = []
    origins: list[str] = []  # of each message, where in the request it comes from
    if instructions is not None:
        messages.append({"role": "system", "content": instructions})
        origins.append("instructions")
    for number, item in enumerate((*past, *own)):
        where = "previous_response_id" if number < len(past) else f"input[{number - len(past)}]"
        if _add(messages, item):
            origins.append(where)
    try:
        return check_messages(messages)
    except MessageError as error:
        where = "input" if error.index is None else origins[error.index]
        raise invalid(f"Invalid '{where}': {error.text}.", where) from None


def _add(messages: list[dict[str, Any]], item: Item) -> bool:
    """Append what an item says; whether that is a message more. Calls belong to the message before them."""
    if item["type"] == "function_call_output":
        output = _content(item["output"])
        messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": output})
        return True
    if item["type"] == "message":
        messages.append({"role": item["role"], "content": _content(item["content"])})
        return True
    function = {"name": item["name"], "arguments": item["arguments"]}
    call = {"id": item["call_id"], "type": "function", "function": function}
    if messages and messages[-1]["role"] == "assistant":
        messages[-1].setdefault("tool_calls", []).append(call)
        return False
    messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
    return True


def _content(parts: Any) -> Any:
    if isinstance(parts, str):
        return parts
    if len(parts) == 1:
        return parts[0]["text"]
    return [{"type": "text", "text": part["text"]} for part in parts]

"""What a conversation may look like: roles, content, tool calls. One set of rules for files and for chat.

Knows neither lines nor HTTP: a fault names the message by its index and the field inside it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from app.core.json_text import JsonError, parse_json

ROLES = ("system", "developer", "user", "assistant", "tool")
_KEYS = {
    "system": {"role", "content", "name"},
    "developer": {"role", "content", "name"},
    "user": {"role", "content", "name"},
    "assistant": {"role", "content", "name", "tool_calls", "weight", "refusal", "annotations", "audio"},
    "tool": {"role", "content", "tool_call_id", "name"},
}
MAX_TOOLS = 128


class MessageError(ValueError):
    """A fault in one message (`index` counts from 0; None: in the conversation as a whole)."""

    def __init__(self, text: str, *, index: int | None = None, field: str | None = None) -> None:
        super().__init__(text)
        self.text = text
        self.index = index
        self.field = field


def check_messages(messages: object) -> list[dict[str, Any]]:
    """The conversation without its nulls when every message is well formed, else raise MessageError.

    The official client's own messages carry a null for every field that is not there. What an assistant
    refused with is its text.
    """
    if not isinstance(messages, list) or not messages:
        raise MessageError("'messages' must be a list with at least one message")
    checked = [_without_nulls(message, index) for index, message in enumerate(messages)]
    open_calls: set[str] = set()
    for index, message in enumerate(checked):
        role = _check_role(message, index)
        _check_keys(message, role, index)
        _check_content(message, role, index)
        if role == "tool":
            open_calls.remove(_check_answer(message, open_calls, index))
            continue
        _check_answered(open_calls, index)
        if role == "assistant":
            open_calls = _check_tool_calls(message, index)
    return checked


def check_tools(tools: object) -> list[dict[str, Any]] | None:
    """Return the tool definitions when they are well formed, else raise MessageError."""
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not 1 <= len(tools) <= MAX_TOOLS:
        raise MessageError(f"'tools' must be a list of 1 to {MAX_TOOLS} tools", field="tools")
    for number, tool in enumerate(tools):
        where = f"tools[{number}]"
        if not isinstance(tool, dict) or tool.get("type") != "function":
            raise MessageError(f"{where} must be an object with type 'function'", field=where)
        function = tool.get("function")
        if not isinstance(function, dict) or not _is_name(function.get("name")):
            raise MessageError(
                f"{where}.function.name must be 1 to 64 letters, digits, '_' or '-'", field=where
            )
        if not isinstance(function.get("parameters", {}), dict):
            raise MessageError(f"{where}.function.parameters must be a JSON schema object", field=where)
    return tools


def _without_nulls(message: object, index: int) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise MessageError("is not an object", index=index)
    kept = {key: value for key, value in message.items() if value is not None or key in ("role", "content")}
    return _with_refusal_as_text(kept) if kept.get("role") == "assistant" else kept


def _with_refusal_as_text(message: dict[str, Any]) -> dict[str, Any]:
    content, refusal = message.get("content"), message.get("refusal")
    if content is None and isinstance(refusal, str) and refusal:
        return message | {"content": refusal}
    if not isinstance(content, list):
        return message
    refused = [isinstance(part, dict) and part.get("type") == "refusal" for part in content]
    parts = [
        {"type": "text", "text": part.get("refusal")} if is_refusal else part
        for part, is_refusal in zip(content, refused, strict=True)
    ]
    return message | {"content": parts}


def _check_role(message: dict[str, Any], index: int) -> str:
    if "role" not in message:
        raise MessageError("Discriminator 'role' is missing in value", index=index, field="role")
    role = message["role"]
    if role == "function":
        raise MessageError("role 'function' is retired; use 'tool'", index=index, field="role")
    if role not in ROLES:
        shown = json.dumps(role)[:40]
        raise MessageError(f"role {shown} is not one of {', '.join(ROLES)}", index=index, field="role")
    return str(role)


def _check_keys(message: dict[str, Any], role: str, index: int) -> None:
    for key in message:
        if key == "function_call":
            raise MessageError("'function_call' is retired; use 'tool_calls'", index=index, field=key)
        if key not in _KEYS[role]:
            raise MessageError(
                f"key '{key[:40]}' does not belong in a message of role '{role}'", index=index, field=key[:40]
            )
    if "weight" in message and (message["weight"] not in (0, 1) or isinstance(message["weight"], bool)):
        raise MessageError("'weight' must be 0 or 1", index=index, field="weight")
    name = message.get("name")
    if name is not None and not (isinstance(name, str) and 0 < len(name) <= 64):
        raise MessageError("'name' must be a string of 1 to 64 characters", index=index, field="name")


def _check_content(message: dict[str, Any], role: str, index: int) -> None:
    content = message.get("content")
    if content is None:
        if role == "assistant" and message.get("tool_calls"):
            return
        raise MessageError("'content' is missing", index=index, field="content")
    if isinstance(content, str):
        return
    if not isinstance(content, list) or not content:
        raise MessageError("'content' must be a string or a list of text parts", index=index, field="content")
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            shown = kind if isinstance(kind, str) else "unknown"
            raise MessageError(
                f"content part {number + 1} is of type '{shown[:40]}'; only text parts are supported",
                index=index,
                field=f"content[{number}]",
            )


def _check_tool_calls(message: dict[str, Any], index: int) -> set[str]:
    calls = message.get("tool_calls")
    if calls is None:
        return set()
    if not isinstance(calls, list) or not calls:
        raise MessageError(
            "'tool_calls' must be a list with at least one call", index=index, field="tool_calls"
        )
    return {_check_tool_call(call, index, f"tool_calls[{number}]") for number, call in enumerate(calls)}


def _check_tool_call(call: object, index: int, where: str) -> str:
    function = call.get("function") if isinstance(call, dict) else None
    if (
        not isinstance(call, dict)
        or call.get("type") != "function"
        or not isinstance(call.get("id"), str)
        or not isinstance(function, dict)
        or not _is_name(function.get("name"))
    ):
        raise MessageError(
            f"{where} must be {{id, type: 'function', function: {{name, arguments}}}}",
            index=index,
            field=where,
        )
    arguments = function.get("arguments")
    try:
        if not isinstance(arguments, str):
            raise JsonError("not a string")
        parse_json(arguments)
    except JsonError:
        text = f"{where}.function.arguments must be a string that holds JSON"
        raise MessageError(text, index=index, field=f"{where}.function.arguments") from None
    return str(call["id"])


def _check_answered(open_calls: set[str], index: int) -> None:
    for call_id in sorted(open_calls):
        raise MessageError(
            f"comes before the tool call {call_id[:64]!r} was answered; "
            "each call needs a message of role 'tool' right after it",
            index=index,
            field="role",
        )


def _check_answer(message: dict[str, Any], open_calls: set[str], index: int) -> str:
    call_id = message.get("tool_call_id")
    if not isinstance(call_id, str):
        raise MessageError("'tool_call_id' is missing", index=index, field="tool_call_id")
    if call_id not in open_calls:
        raise MessageError(
            f"'tool_call_id' {call_id[:64]!r} answers no tool call of an earlier assistant message",
            index=index,
            field="tool_call_id",
        )
    return call_id


def _is_name(value: object) -> bool:
    return (
        isinstance(value, str)
        and 0 < len(value) <= 64
        and all(c.isascii() and (c.isalnum() or c in "_-") for c in value)
    )


def has_assistant(messages: Sequence[dict[str, Any]]) -> bool:
    """Whether there is anything to learn from."""
    return any(message["role"] == "assistant" for message in messages)

"""Responses that are refused before any work: by name, with the code and the path of the field."""

from __future__ import annotations

from typing import Any

import pytest

from tests.api.conftest import Tenant
from tests.api.expecting import assert_refused
from tests.api.test_responses import CALL, OUTPUT, STRICT, TOOL, respond
from tests.api.workers import InferenceWorker


def item(**fields: Any) -> dict[str, Any]:
    return {"input": [fields]}


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "no input": ({"input": None}, "missing_required_parameter", "input"),
    "an empty input": ({"input": []}, "empty_array", "input"),
    "an input of another type": ({"input": 7}, "invalid_type", "input"),
    "an item as text": ({"input": ["hi"]}, "invalid_type", "input[0]"),
    "an item of reasoning": (item(type="reasoning", summary=[]), "invalid_value", "input[0].type"),
    "a reference": (item(type="item_reference", id="x"), "invalid_value", "input[0].type"),
    "a wrong role": (item(role="tool", content="x"), "invalid_value", "input[0].role"),
    "no content": (item(role="user"), "invalid_type", "input[0].content"),
    "a key too many": (item(role="user", content="x", name="n"), "unknown_parameter", "input[0].name"),
    "an image": (
        item(role="user", content=[{"type": "input_image", "image_url": "x"}]),
        "unsupported_parameter",
        "input[0].content[0].type",
    ),
    "a file": (
        item(role="user", content=[{"type": "input_file", "file_id": "x"}]),
        "unsupported_parameter",
        "input[0].content[0].type",
    ),
    "a text without text": (
        item(role="user", content=[{"type": "input_text"}]),
        "invalid_type",
        "input[0].content[0].text",
    ),
    "a call without a name": ({"input": [{**CALL, "name": None}, OUTPUT]}, "invalid_type", "input[0].name"),
    "arguments that are no JSON": (
        {"input": [{**CALL, "arguments": "{"}, OUTPUT]},
        "invalid_value",
        "input[0]",
    ),
    "an output of no call": ({"input": [OUTPUT]}, "invalid_value", "input[0]"),
    "a call without an output": (
        {"input": [CALL, {"role": "user", "content": "x"}]},
        "invalid_value",
        "input[1]",
    ),
    "too many items": ({"input": [{"role": "user", "content": "x"}] * 51}, "array_above_max_length", "input"),
    "few tokens": ({"max_output_tokens": 15}, "integer_below_min_value", "max_output_tokens"),
    "many tokens": ({"max_output_tokens": 4097}, "integer_above_max_value", "max_output_tokens"),
    "hot": ({"temperature": 2.1}, "decimal_above_max_value", "temperature"),
    "top_p": ({"top_p": -0.1}, "decimal_below_min_value", "top_p"),
    "21 logprobs": ({"top_logprobs": 21}, "integer_above_max_value", "top_logprobs"),
    "an unknown include": ({"include": ["x"]}, "invalid_value", "include[0]"),
    "options without stream": ({"stream_options": {}}, "invalid_value", "stream_options"),
    "usage of chat": (
        {"stream": True, "stream_options": {"include_usage": True}},
        "unknown_parameter",
        "stream_options.include_usage",
    ),
    "an unknown field": ({"messages": []}, "unknown_parameter", "messages"),
    "a previous response that is none": (
        {"previous_response_id": "resp_none"},
        "previous_response_not_found",
        "previous_response_id",
    ),
    "a tool of the service": ({"tools": [{"type": "web_search"}]}, "unsupported_parameter", "tools[0].type"),
    "a custom tool": ({"tools": [{"type": "custom", "name": "c"}]}, "unsupported_parameter", "tools[0].type"),
    "a tool as in chat": (
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        "unknown_parameter",
        "tools[0].function",
    ),
    "a tool without a name": ({"tools": [{"type": "function"}]}, "invalid_value", "tools[0].name"),
    "129 tools": ({"tools": [TOOL] * 129}, "array_above_max_length", "tools"),
    "a schema not strict": (
        {"tools": [TOOL | {"strict": True}]},
        "invalid_function_parameters",
        "tools[0].parameters",
    ),
    "a choice without tools": ({"tool_choice": "required"}, "invalid_value", "tool_choice"),
    "a choice as in chat": (
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}},
        "invalid_value",
        "tool_choice",
    ),
    "a choice of a built-in tool": (
        {"tools": [TOOL], "tool_choice": {"type": "web_search_preview"}},
        "invalid_value",
        "tool_choice",
    ),
    "a format of another type": ({"text": {"format": {"type": "xml"}}}, "invalid_value", "text.format.type"),
    "a format as in chat": (
        {"text": {"format": {"type": "json_schema", "json_schema": {"name": "n", "schema": STRICT}}}},
        "unknown_parameter",
        "text.format.json_schema",
    ),
    "a schema that is none": (
        {"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "nothing"}}}},
        "invalid_json_schema",
        "text.format",
    ),
    "background": ({"background": True}, "unsupported_parameter", "background"),
    "truncation": ({"truncation": "auto"}, "unsupported_parameter", "truncation"),
    "conversation": ({"conversation": "conv_1"}, "unsupported_parameter", "conversation"),
    "prompt": ({"prompt": {"id": "pmpt_1"}}, "unsupported_parameter", "prompt"),
    "context management": (
        {"context_management": [{"type": "compaction"}]},
        "unsupported_parameter",
        "context_management",
    ),
    "moderation": ({"moderation": {"model": "m"}}, "unsupported_parameter", "moderation"),
    "image": ({"image": {"context_compression": "auto"}}, "unsupported_parameter", "image"),
    "access programs": (
        {"access_programs": {"cyber": "standard"}},
        "unsupported_parameter",
        "access_programs",
    ),
    "background options": (
        {"background_options": {"completion_window": "soonest"}},
        "unsupported_parameter",
        "background_options",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_by_name_before_anything_is_queued(
    tenant: Tenant, worker: InferenceWorker, case: str
) -> None:
    fields, code, param = REFUSED[case]
    assert_refused(respond(tenant, **fields), 400, code=code, param=param)
    assert worker.requests == []

"""Tools and response formats through the API: what the worker is asked, and calls in the shapes of OpenAI."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from app.core.base_models import DEFAULT_BASE_MODEL, load_catalogue
from app.core.completions import FinishReason
from app.core.settings import Settings
from tests.api.conftest import Tenant
from tests.api.expecting import assert_refused
from tests.api.servers import api_server
from tests.api.test_chat import chat, events
from tests.api.workers import InferenceWorker, says

TOOLS = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in "fg"]
TWO_CALLS = (
    'Let me see.\n<tool_call>\n{"name": "f", "arg',
    'uments": {"a": ',
    '1}}\n</tool_call>\n<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>',
)
NAMED = {"type": "function", "function": {"name": "g"}}
SCHEMA = {"type": "object", "properties": {}, "additionalProperties": False}


def format_of(**fields: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "n", **fields}}}


def test_calls_in_the_text_become_tool_calls(tenant: Tenant, worker: InferenceWorker) -> None:
    worker.script = says(*TWO_CALLS)
    [choice] = chat(tenant, tools=TOOLS).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert message["content"] == "Let me see."
    ids = [call["id"] for call in message["tool_calls"]]
    assert [call["function"] for call in message["tool_calls"]] == [
        {"name": "f", "arguments": '{"a": 1}'},
        {"name": "g", "arguments": "{}"},
    ]
    assert len(set(ids)) == 2
    assert all(id.startswith("call_") for id in ids)
    assert {call["type"] for call in message["tool_calls"]} == {"function"}


def test_a_stream_names_each_call_once_and_then_its_arguments(
    tenant: Tenant, worker: InferenceWorker
) -> None:
    worker.script = says(*TWO_CALLS)
    choices = [c["choices"][0] for c in events(chat(tenant, tools=TOOLS, stream=True, n=1))]
    deltas = [choice["delta"] for choice in choices]
    assert "".join(delta.get("content") or "" for delta in deltas) == "Let me see."
    parts = [part for delta in deltas for part in delta.get("tool_calls", [])]
    first, second = ([part for part in parts if part["index"] == number] for number in (0, 1))
    for begun, name, arguments in ((first, "f", '{"a": 1}'), (second, "g", "{}")):
        assert begun[0]["function"] == {"name": name, "arguments": ""}
        assert begun[0]["type"] == "function"
        assert all(set(part) == {"index", "function"} for part in begun[1:])
        assert "".join(part["function"]["arguments"] for part in begun) == arguments
    assert first[1]["function"]["arguments"] == '{"a": '  # as it came, not at the end
    assert choices[-1]["finish_reason"] == "tool_calls"


def test_a_call_alone_has_no_content_and_one_cut_off_says_length(
    tenant: Tenant, worker: InferenceWorker
) -> None:
    worker.script = says('<tool_call>\n{"name": "f", "arguments": {"a', reason=FinishReason.LENGTH)
    [choice] = chat(tenant, tools=TOOLS).json()["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] is None
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"a'


def test_without_tools_the_same_text_is_text(tenant: Tenant, worker: InferenceWorker) -> None:
    worker.script = says(*TWO_CALLS)
    for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        [choice] = chat(tenant, **fields).json()["choices"]
        assert choice["message"]["content"] == "".join(TWO_CALLS)
        assert choice["finish_reason"] == "stop"
        assert worker.requests[-1].tools is None


def test_a_free_choice_sends_no_grammar_and_a_forced_one_does(
    tenant: Tenant, worker: InferenceWorker
) -> None:
    for choice in (None, "auto"):
        assert chat(tenant, tools=TOOLS, tool_choice=choice).status_code == 200
        assert worker.requests[-1].grammar is None
    assert chat(tenant, tools=TOOLS, tool_choice="required").status_code == 200
    both = worker.requests[-1].grammar
    assert chat(tenant, tools=TOOLS, tool_choice=NAMED).status_code == 200
    named = worker.requests[-1].grammar
    assert both is not None
    assert named is not None
    assert ("call_1" in both, "call_1" in named) == (True, False)
    assert [tool["function"]["name"] for tool in worker.requests[-1].tools or []] == ["g"]


def test_a_format_is_sent_as_a_grammar(tenant: Tenant, worker: InferenceWorker) -> None:
    worker.script = says("{}")
    assert chat(tenant, response_format={"type": "json_object"}).status_code == 200
    assert chat(tenant, **format_of(schema=SCHEMA, strict=True, description="d")).status_code == 200
    grammars = [request.grammar for request in worker.requests]
    assert all(grammar and grammar.startswith("start: %json") for grammar in grammars)
    assert json.dumps(SCHEMA)[:-1] in (grammars[1] or "")


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "a format as text": ({"response_format": "json"}, "invalid_type", "response_format"),
    "a format of another type": (
        {"response_format": {"type": "xml"}},
        "invalid_value",
        "response_format.type",
    ),
    "a key too many": (
        {"response_format": {"type": "json_object", "x": 1}},
        "unknown_parameter",
        "response_format.x",
    ),
    "no name": (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
        "invalid_value",
        "response_format.json_schema.name",
    ),
    "no schema": (format_of(), "invalid_type", "response_format.json_schema.schema"),
    "a schema that is none": (
        format_of(schema={"type": "nothing"}),
        "invalid_json_schema",
        "response_format",
    ),
    "not strict enough": (
        format_of(schema={"type": "object"}, strict=True),
        "invalid_json_schema",
        "response_format",
    ),
    "a choice without tools": ({"tool_choice": "required"}, "invalid_value", "tool_choice"),
    "a choice of nothing": ({"tools": TOOLS, "tool_choice": "maybe"}, "invalid_value", "tool_choice"),
    "a function not there": (
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "h"}}},
        "invalid_value",
        "tool_choice",
    ),
    "an end ignored in a format": (
        {"response_format": {"type": "json_object"}, "luthier": {"ignore_eos": True}},
        "invalid_value",
        "luthier.ignore_eos",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_held_to_is_refused_before_anything_is_queued(
    tenant: Tenant, worker: InferenceWorker, case: str
) -> None:
    fields, code, param = REFUSED[case]
    assert_refused(chat(tenant, **fields), 400, code=code, param=param)
    assert worker.requests == []


def test_a_model_that_writes_no_calls_refuses_tools_by_name(
    tenant: Tenant, settings: Settings, worker: InferenceWorker, tmp_path: Path
) -> None:
    entry = load_catalogue().entries[DEFAULT_BASE_MODEL]
    models = tmp_path / "models.toml"
    models.write_text(
        f'[models.{DEFAULT_BASE_MODEL}]\nsource = "{entry.source}"\nrevision = "{entry.revision}"\n'
        f'sha256 = "{entry.sha256}"\ncontext_length = 8192\nlicence = "Apache-2.0"\n'
    )
    with api_server(settings.model_copy(update={"models_file": models})) as url:
        body = {"model": DEFAULT_BASE_MODEL, "messages": [{"role": "user", "content": "hi"}], "tools": TOOLS}
        answer = tenant.http.post(f"{url}/v1/chat/completions", json=body)
        assert_refused(answer, 400, code="unsupported_parameter", param="tools", says="tool_format")
        body["tool_choice"] = "none"
        assert tenant.http.post(f"{url}/v1/chat/completions", json=body).status_code == 200

"""Every parameter the official client can send: done, harmless and taken, or refused by its name."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types import completion_create_params as completions
from openai.types.chat import completion_create_params as chat
from openai.types.responses import response_create_params as responses

from app.core.base_models import DEFAULT_BASE_MODEL
from tests.api.conftest import Tenant
from tests.api.expecting import assert_refused
from tests.api.workers import InferenceWorker

FUNCTION: dict[str, Any] = {"name": "f", "parameters": {"type": "object"}}
SAMPLING: dict[str, Any] = {"temperature": 0.5, "top_p": 0.5, "user": "u"}
CACHING: dict[str, Any] = {
    "prompt_cache_key": "k",
    "prompt_cache_options": {"mode": "implicit"},
    "prompt_cache_retention": "24h",
    "safety_identifier": "s",
    "service_tier": "auto",
}
OLDER: dict[str, Any] = SAMPLING | {
    "frequency_penalty": 1,
    "logit_bias": {"7": 1},
    "max_tokens": 16,
    "n": 2,
    "presence_penalty": 1,
    "seed": 1,
    "stop": ["x"],
    "stream_options": {"include_usage": True, "include_obfuscation": False},
}
TAKEN: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": OLDER
    | CACHING
    | {
        "messages": [{"role": "user", "content": "hi"}],
        "logprobs": True,
        "max_completion_tokens": 16,
        "metadata": {"a": "b"},
        "modalities": ["text"],
        "moderation": {"model": "m"},
        "parallel_tool_calls": True,
        "prediction": {"type": "content", "content": "x"},
        "reasoning_effort": "low",
        "response_format": {"type": "json_object"},
        "store": True,
        "tool_choice": "none",
        "tools": [{"type": "function", "function": FUNCTION}],
        "top_logprobs": 1,
        "verbosity": "low",
    },
    "/v1/completions": OLDER | {"prompt": "hi", "best_of": 2, "echo": True, "logprobs": 1},
    "/v1/responses": SAMPLING
    | CACHING
    | {
        "input": "hi",
        "include": ["message.output_text.logprobs"],
        "instructions": "i",
        "max_output_tokens": 16,
        "max_tool_calls": 1,
        "metadata": {"a": "b"},
        "parallel_tool_calls": True,
        "reasoning": {"effort": "low"},
        "store": False,
        "stream_options": {"include_obfuscation": False},
        "text": {"format": {"type": "json_object"}, "verbosity": "low"},
        "tool_choice": "none",
        "tools": [{"type": "function", **FUNCTION}],
        "top_logprobs": 1,
        "truncation": "disabled",
    },
}
REFUSED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "audio": {"voice": "alloy", "format": "wav"},
        "function_call": "auto",
        "functions": [FUNCTION],
        "modalities": ["audio"],
        "web_search_options": {},
    },
    "/v1/completions": {"suffix": "end"},
    "/v1/responses": {
        "access_programs": {"cyber": "standard"},
        "background": True,
        "background_options": {"completion_window": "soonest"},
        "context_management": [{"type": "compaction"}],
        "conversation": "conv_1",
        "image": {"context_compression": "auto"},
        "moderation": {"model": "m"},
        "prompt": {"id": "pmpt_1"},
        "truncation": "auto",
    },
}
KNOWN_BY_THE_CLIENT = {
    "/v1/chat/completions": chat.CompletionCreateParamsBase,
    "/v1/completions": completions.CompletionCreateParamsBase,
    "/v1/responses": responses.ResponseCreateParamsBase,
}
NEEDS: dict[str, dict[str, Any]] = {
    "stream_options": {"stream": True},
    "top_logprobs": {"logprobs": True},
}
APART = {"previous_response_id", "model"}  # tested where there is something to go on from


@pytest.mark.parametrize("path", KNOWN_BY_THE_CLIENT)
def test_every_parameter_of_the_client_is_taken_or_refused_by_name(
    tenant: Tenant, worker: InferenceWorker, path: str
) -> None:
    known = set(KNOWN_BY_THE_CLIENT[path].__annotations__) - APART
    assert known == set(TAKEN[path]) | set(REFUSED[path])
    asked = "input" if path == "/v1/responses" else "prompt" if path == "/v1/completions" else "messages"
    body = {"model": DEFAULT_BASE_MODEL, asked: TAKEN[path][asked]}
    for field, value in TAKEN[path].items():
        needs = {} if path == "/v1/responses" and field != "stream_options" else NEEDS.get(field, {})
        answer = tenant.http.post(path, json=body | {field: value} | needs)
        assert answer.status_code == 200, (field, answer.text)
    for field, value in REFUSED[path].items():
        answer = tenant.http.post(path, json=body | {field: value})
        assert_refused(answer, 400, code="unsupported_parameter", param=field)


PARTS: dict[str, tuple[dict[str, Any], str]] = {
    "an image": ({"type": "image_url", "image_url": {"url": "x"}}, "messages[0].content[0]"),
    "sound": (
        {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
        "messages[0].content[0]",
    ),
    "a file": ({"type": "file", "file": {"file_id": "x"}}, "messages[0].content[0]"),
}


@pytest.mark.parametrize("case", PARTS)
def test_what_is_no_text_is_refused_with_its_place(tenant: Tenant, case: str) -> None:
    part, param = PARTS[case]
    body = {"model": DEFAULT_BASE_MODEL, "messages": [{"role": "user", "content": [part]}]}
    answer = tenant.http.post("/v1/chat/completions", json=body)
    assert_refused(answer, 400, code="invalid_value", param=param, says="only text")


def test_custom_tools_are_refused_with_their_place(tenant: Tenant) -> None:
    tools = [{"type": "function", "function": FUNCTION}, {"type": "custom", "custom": {"name": "c"}}]
    body = {"model": DEFAULT_BASE_MODEL, "messages": [{"role": "user", "content": "hi"}], "tools": tools}
    answer = tenant.http.post("/v1/chat/completions", json=body)
    assert_refused(answer, 400, code="invalid_value", param="tools[1]", says="'function'")


def test_what_an_assistant_refused_with_is_its_text(tenant: Tenant, worker: InferenceWorker) -> None:
    refused: list[dict[str, Any]] = [
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "I will not."}]},
        {"role": "assistant", "content": None, "refusal": "Nor that."},
    ]
    messages = [{"role": "user", "content": "hi"}, *refused, {"role": "user", "content": "why?"}]
    body = {"model": DEFAULT_BASE_MODEL, "messages": messages}
    assert tenant.http.post("/v1/chat/completions", json=body).status_code == 200
    told = [message["content"] for message in worker.requests[0].messages]
    assert told == ["hi", [{"type": "text", "text": "I will not."}], "Nor that.", "why?"]
    messages[1]["content"] = [{"type": "refusal"}]
    answer = tenant.http.post("/v1/chat/completions", json=body)
    assert_refused(answer, 400, code="invalid_value", param="messages[1].content[0]")

"""Chat requests that are refused before any work: by name, with the code and the path of the field."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from app.core.settings import Settings
from tests.api.conftest import Tenant
from tests.api.expecting import assert_refused
from tests.api.servers import api_server
from tests.api.test_chat import BODY, PATH, chat
from tests.api.workers import InferenceWorker

MANY_TOOLS = [{"type": "function", "function": {"name": f"f{i}"}} for i in range(129)]
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "no messages": ({"messages": []}, "empty_array", "messages"),
    "messages of another type": ({"messages": "hi"}, "invalid_type", "messages"),
    "no role": ({"messages": [{"content": "x"}]}, "invalid_value", "messages[0].role"),
    "a wrong role": (
        {"messages": [*BODY["messages"], {"role": "wizard", "content": "x"}]},
        "invalid_value",
        "messages[1].role",
    ),
    "no content": ({"messages": [{"role": "user"}]}, "invalid_value", "messages[0].content"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "invalid_value",
        "messages[0].content[0]",
    ),
    "an unknown key in a message": (
        {"messages": [{"role": "user", "content": "x", "color": 1}]},
        "invalid_value",
        "messages[0].color",
    ),
    "too many messages": ({"messages": BODY["messages"] * 51}, "array_above_max_length", "messages"),
    "hot": ({"temperature": 2.1}, "decimal_above_max_value", "temperature"),
    "cold": ({"temperature": -0.1}, "decimal_below_min_value", "temperature"),
    "temperature as text": ({"temperature": "1"}, "invalid_type", "temperature"),
    "temperature as truth": ({"temperature": True}, "invalid_type", "temperature"),
    "top_p": ({"top_p": 1.5}, "decimal_above_max_value", "top_p"),
    "n of none": ({"n": 0}, "integer_below_min_value", "n"),
    "n of many": ({"n": 5}, "integer_above_max_value", "n"),
    "n of 10^9": ({"n": 10**9}, "integer_above_max_value", "n"),
    "n as truth": ({"n": True}, "invalid_type", "n"),
    "no tokens": ({"max_tokens": 0}, "integer_below_min_value", "max_tokens"),
    "too many tokens": ({"max_tokens": 10**9}, "integer_above_max_value", "max_tokens"),
    "too many completion tokens": (
        {"max_completion_tokens": 4097},
        "integer_above_max_value",
        "max_completion_tokens",
    ),
    "two limits": ({"max_tokens": 1, "max_completion_tokens": 2}, "invalid_value", "max_tokens"),
    "five stops": ({"stop": ["a"] * 5}, "array_above_max_length", "stop"),
    "an empty stop": ({"stop": ""}, "invalid_value", "stop"),
    "a number as stop": ({"stop": [1]}, "invalid_type", "stop"),
    "a large seed": ({"seed": 2**63}, "integer_above_max_value", "seed"),
    "stream as text": ({"stream": "yes"}, "invalid_type", "stream"),
    "options without stream": (
        {"stream_options": {"include_usage": True}},
        "invalid_value",
        "stream_options",
    ),
    "unknown option": ({"stream": True, "stream_options": {"x": 1}}, "unknown_parameter", "stream_options.x"),
    "unknown field": ({"color": "red"}, "unknown_parameter", "color"),
    "17 metadata": ({"metadata": {str(i): "" for i in range(17)}}, "object_above_max_properties", "metadata"),
    "129 tools": ({"tools": MANY_TOOLS}, "invalid_value", "tools"),
    "a tool without a name": (
        {"tools": [{"type": "function", "function": {}}]},
        "invalid_value",
        "tools[0]",
    ),
    "a large penalty": ({"frequency_penalty": 2.5}, "decimal_above_max_value", "frequency_penalty"),
    "a presence penalty too small": ({"presence_penalty": -3}, "decimal_below_min_value", "presence_penalty"),
    "a large bias": ({"logit_bias": {"1": 101}}, "invalid_value", "logit_bias"),
    "a bias of a word": ({"logit_bias": {"hello": 1}}, "invalid_value", "logit_bias"),
    "a bias as text": ({"logit_bias": {"1": "5"}}, "invalid_type", "logit_bias"),
    "biases as a list": ({"logit_bias": [1]}, "invalid_type", "logit_bias"),
    "many biases": (
        {"logit_bias": {str(i): 1 for i in range(1025)}},
        "object_above_max_properties",
        "logit_bias",
    ),
    "21 logprobs": ({"logprobs": True, "top_logprobs": 21}, "integer_above_max_value", "top_logprobs"),
    "top logprobs alone": ({"top_logprobs": 2}, "invalid_value", "top_logprobs"),
    "an unknown extension": ({"luthier": {"x": 1}}, "unknown_parameter", "luthier.x"),
    "store as text": ({"store": "yes"}, "invalid_type", "store"),
    "audio": ({"modalities": ["text", "audio"]}, "unsupported_parameter", "modalities"),
    "functions": ({"functions": []}, "unsupported_parameter", "functions"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_request_that_cannot_be_done_is_refused_by_name(tenant: Tenant, case: str) -> None:
    fields, code, param = REFUSED[case]
    assert_refused(chat(tenant, **fields), 400, code=code, param=param)


@pytest.mark.parametrize("field", ["model", "messages"])
def test_a_missing_field_is_named(tenant: Tenant, field: str) -> None:
    body = {key: value for key, value in BODY.items() if key != field}
    answer = tenant.http.post(PATH, json=body)
    assert_refused(answer, 400, code="missing_required_parameter", param=field, says=f"'{field}'")


def test_an_unknown_model_is_not_found(tenant: Tenant) -> None:
    for model in ("gpt-9", "../../etc/passwd", "ft:x:y:z:1", "a\0b"):
        answer = chat(tenant, model=model)
        if "\0" in model:
            assert_refused(answer, 400, code="invalid_value", param="model")
        else:
            assert_refused(answer, 404, code="model_not_found", param="model")


def test_more_work_than_one_request_may_ask_for_is_refused(
    tenant: Tenant, settings: Settings, worker: InferenceWorker
) -> None:
    small = settings.model_copy(update={"max_completion_tokens": 1024, "max_n": 16})
    headers = dict(tenant.http.headers)
    with api_server(small) as url, httpx.Client(base_url=url, headers=headers) as client:
        assert_refused(
            client.post(PATH, json=BODY | {"n": 16, "max_tokens": 1000}), 400, code="invalid_value", param="n"
        )
        assert client.post(PATH, json=BODY | {"n": 16, "max_tokens": 500}).status_code == 200

"""Responses through the real queue: what the worker is asked, what is kept, and what is refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from sqlalchemy import delete, select, text, update
from sqlalchemy.orm import Session, sessionmaker

from app.core import stored_responses
from app.core.base_models import DEFAULT_BASE_MODEL
from app.core.completions import Delta, Failed, FinishReason
from app.core.db import transaction
from app.core.tables import StoredResponse
from tests.api.conftest import MAX_BODY_BYTES, Tenant
from tests.api.expecting import assert_refused
from tests.api.test_chat import wait_for
from tests.api.workers import InferenceWorker, says

PATH = "/v1/responses"
BODY: dict[str, Any] = {"model": DEFAULT_BASE_MODEL, "input": "hi"}
TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}}
CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "c", "output": "42"}
STRICT = {"type": "object", "properties": {}, "required": [], "additionalProperties": False}


def respond(tenant: Tenant, **fields: Any) -> httpx.Response:
    """Ask, with these fields added."""
    return tenant.http.post(PATH, json=BODY | fields)


def events(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    """All events of a stream; each is named as its type, and nothing follows the last."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    *blocks, rest = answer.text.split("\n\n")
    assert rest == ""
    for block in blocks:
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        yield event


def test_a_request_reaches_the_worker_as_it_was_asked(tenant: Tenant, worker: InferenceWorker) -> None:
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    items = [
        {"role": "developer", "content": "d"},
        {"role": "user", "content": parts},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "c"}]},
        CALL,
        CALL | {"call_id": "d", "id": "fc_1", "status": "completed"},
        OUTPUT,
        OUTPUT | {"call_id": "d", "output": [parts[0]]},
    ]
    answer = respond(
        tenant,
        **{"input": items, "instructions": "be kind", "temperature": 0, "top_p": 0.5, "tools": [TOOL]},
        **{"max_output_tokens": 17, "luthier": {"ignore_eos": True}, "store": False},
    )
    assert answer.status_code == 200, answer.text
    [request] = worker.requests
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    assert request.messages == [
        {"role": "system", "content": "be kind"},
        {"role": "developer", "content": "d"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "tool_calls": [call | {"id": "c"}, call | {"id": "d"}]},
        {"role": "tool", "tool_call_id": "c", "content": "42"},
        {"role": "tool", "tool_call_id": "d", "content": "a"},
    ]
    assert (request.sampling.max_tokens, request.sampling.temperature, request.sampling.top_p) == (17, 0, 0.5)
    assert (request.sampling.n, request.sampling.ignore_eos) == (1, True)
    shown = {"name": "f", "parameters": {"type": "object"}, "strict": False}
    assert request.tools == [{"type": "function", "function": shown}]
    assert request.id == answer.json()["id"]


def test_nulls_mean_absent_and_harmless_fields_are_accepted(tenant: Tenant, worker: InferenceWorker) -> None:
    optional = [
        "instructions",
        "previous_response_id",
        "store",
        "stream",
        "stream_options",
        "include",
        "text",
    ]
    optional += [
        "max_output_tokens",
        "temperature",
        "top_p",
        "top_logprobs",
        "tools",
        "tool_choice",
        "metadata",
    ]
    optional += ["parallel_tool_calls", "background", "truncation", "conversation", "prompt", "reasoning"]
    assert respond(tenant, **dict.fromkeys(optional)).status_code == 200
    harmless: dict[str, Any] = {"reasoning": {"effort": "low"}, "user": "u", "safety_identifier": "s"}
    harmless |= {
        "prompt_cache_key": "k",
        "service_tier": "auto",
        "truncation": "disabled",
        "background": False,
    }
    harmless |= {
        "include": ["reasoning.encrypted_content"],
        "text": {"verbosity": "low"},
        "max_tool_calls": 3,
    }
    assert respond(tenant, **harmless).status_code == 200
    for request in worker.requests:
        assert (request.sampling.temperature, request.sampling.max_tokens) == (1.0, None)
        assert request.sampling.top_logprobs is None


def test_a_schema_that_can_be_strict_is_held_to_unless_told_otherwise(
    tenant: Tenant, worker: InferenceWorker
) -> None:
    for strict, constrained in ((None, True), (True, True), (False, False)):
        tool = TOOL | {"parameters": STRICT, "strict": strict}
        assert respond(tenant, tools=[tool]).json()["tools"][0]["strict"] is constrained
        assert (worker.requests[-1].grammar is not None) is constrained
    assert respond(tenant, tools=[TOOL]).json()["tools"][0]["strict"] is False


def test_choices_and_formats_are_sent_as_grammars(tenant: Tenant, worker: InferenceWorker) -> None:
    tools = [TOOL, TOOL | {"name": "g"}]
    named = {"type": "function", "name": "g"}
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [named]}
    for choice, names, constrained in (("required", "fg", True), (named, "g", True), (allowed, "g", False)):
        answer = respond(tenant, tools=tools, tool_choice=choice)
        assert answer.json()["tool_choice"] == choice
        shown = worker.requests[-1].tools or []
        assert "".join(tool["function"]["name"] for tool in shown) == names
        assert (worker.requests[-1].grammar is not None) is constrained
    for format in ({"type": "json_object"}, {"type": "json_schema", "name": "n", "schema": STRICT}):
        assert respond(tenant, text={"format": format}).json()["text"]["format"] == format
        assert (worker.requests[-1].grammar or "").startswith("start: %json")


def test_without_words_the_answer_is_an_empty_message(tenant: Tenant, worker: InferenceWorker) -> None:
    worker.script = says()
    [item] = respond(tenant).json()["output"]
    assert item["content"] == [{"type": "output_text", "text": "", "annotations": [], "logprobs": []}]
    kinds = [event["type"] for event in events(respond(tenant, stream=True))]
    assert kinds[2:4] == ["response.output_item.added", "response.content_part.added"]
    assert kinds[-1] == "response.completed"


def test_text_after_a_call_is_a_message_of_its_own(tenant: Tenant, worker: InferenceWorker) -> None:
    worker.script = says('a<tool_call>{"name": "f", "arguments": {}}</tool_call>b')
    output = respond(tenant, tools=[TOOL]).json()["output"]
    assert [item["type"] for item in output] == ["message", "function_call", "message"]
    assert (output[0]["content"][0]["text"], output[2]["content"][0]["text"]) == ("a", "b")
    done = [e for e in events(respond(tenant, tools=[TOOL], stream=True)) if "output_item.done" in e["type"]]
    assert [event["output_index"] for event in done] == [0, 1, 2]


def test_a_call_cut_by_the_limit_is_incomplete(tenant: Tenant, worker: InferenceWorker) -> None:
    worker.script = says('<tool_call>{"name": "f", "arguments": {"a', reason=FinishReason.LENGTH)
    answer = respond(tenant, tools=[TOOL]).json()
    assert (answer["status"], answer["completed_at"]) == ("incomplete", None)
    assert (answer["output"][0]["status"], answer["output"][0]["arguments"]) == ("incomplete", '{"a')
    again = respond(tenant, previous_response_id=answer["id"])
    assert_refused(again, 400, code="invalid_value", param="previous_response_id", says="arguments")


def test_instructions_are_not_handed_on(tenant: Tenant, worker: InferenceWorker) -> None:
    first = respond(tenant, instructions="be kind").json()
    assert respond(tenant, previous_response_id=first["id"]).json()["instructions"] is None
    assert [message["role"] for message in worker.requests[-1].messages] == ["user", "assistant", "user"]


def test_with_store_false_nothing_is_kept(tenant: Tenant, worker: InferenceWorker) -> None:
    id = respond(tenant, store=False).json()["id"]
    assert_refused(tenant.http.get(f"{PATH}/{id}"), 404, code=None, param="response_id")
    refused = respond(tenant, previous_response_id=id)
    assert_refused(refused, 400, code="previous_response_not_found", param="previous_response_id")


def test_another_project_reads_goes_on_from_and_deletes_nothing(
    tenant: Tenant, neighbour: Tenant, worker: InferenceWorker
) -> None:
    id = respond(tenant).json()["id"]
    path = f"{PATH}/{id}"
    for answer in (
        neighbour.http.get(path),
        neighbour.http.get(f"{path}/input_items"),
        neighbour.http.post(f"{path}/cancel"),
        neighbour.http.delete(path),
    ):
        assert_refused(answer, 404, code=None, param="response_id")
    refused = respond(neighbour, previous_response_id=id)
    assert_refused(refused, 400, code="previous_response_not_found", param="previous_response_id")
    gone = tenant.http.delete(path).json()
    assert gone == {"id": id, "object": "response.deleted", "deleted": True}


def test_a_conversation_that_lost_its_beginning_can_be_read_and_not_gone_on_from(
    tenant: Tenant, worker: InferenceWorker, sessions: sessionmaker[Session]
) -> None:
    ids: list[str] = []
    for _ in range(3):
        ids.append(respond(tenant, previous_response_id=ids[-1] if ids else None).json()["id"])
    path = f"{PATH}/{ids[-1]}/input_items?limit=100"
    assert len(tenant.http.get(path).json()["data"]) == 5
    with transaction(sessions) as session:
        session.execute(delete(StoredResponse).where(StoredResponse.id == ids[0]))
    assert len(tenant.http.get(path).json()["data"]) == 3
    refused = respond(tenant, previous_response_id=ids[-1])
    assert_refused(
        refused, 400, code="previous_response_not_found", param="previous_response_id", says=ids[0]
    )


def test_a_conversation_has_an_end(
    tenant: Tenant,
    worker: InferenceWorker,
    sessions: sessionmaker[Session],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = respond(tenant).json()["id"]
    second = respond(tenant, previous_response_id=first).json()["id"]
    monkeypatch.setattr(stored_responses, "MAX_CHAIN", 1)
    refused = respond(tenant, previous_response_id=second)
    assert_refused(refused, 400, code="context_length_exceeded", param="previous_response_id")
    monkeypatch.undo()
    with transaction(sessions) as session:
        session.execute(update(StoredResponse).values(size_bytes=2 * MAX_BODY_BYTES + 1))
    refused = respond(tenant, previous_response_id=second)
    assert_refused(refused, 400, code="context_length_exceeded", param="previous_response_id")


def test_a_failure_in_the_middle_ends_the_stream_as_failed(tenant: Tenant, worker: InferenceWorker) -> None:
    failed = Failed(status=503, code="engine_stopped", message="The worker was stopped.")
    worker.script = lambda _: [[Delta(index=0, text="Hel")], [failed]]
    *_, last = events(respond(tenant, stream=True))
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert last["response"]["error"] == {"code": "server_error", "message": "The worker was stopped."}
    worker.script = lambda _: [[failed]]
    assert_refused(respond(tenant, stream=True), 503, code="engine_stopped")


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_that_cannot_be_stored_fails_aloud(
    tenant: Tenant, worker: InferenceWorker, sessions: sessionmaker[Session], stream: bool
) -> None:
    with transaction(sessions) as session:
        session.execute(text("LOCK TABLE stored_responses"))
        answer = respond(tenant, stream=stream)
    if stream:
        *_, last = events(answer)
        assert last["type"] == "response.failed"
        assert "could not be stored" in last["response"]["error"]["message"]
    else:
        assert_refused(answer, 503, code="service_unavailable", says="could not be stored")
    with sessions() as session:
        assert session.scalar(select(StoredResponse.id)) is None


def test_too_long_an_input_is_named_as_the_input(tenant: Tenant, worker: InferenceWorker) -> None:
    failed = Failed(status=400, code="context_length_exceeded", message="This is too long.", param="messages")
    worker.script = lambda _: [[failed]]
    assert_refused(respond(tenant), 400, code="context_length_exceeded", param="input")


def test_a_client_that_leaves_stops_the_generation_and_nothing_is_stored(
    tenant: Tenant, worker: InferenceWorker, sessions: sessionmaker[Session]
) -> None:
    worker.script = lambda _: [[Delta(index=0, text="so far")]]
    with tenant.http.stream("POST", PATH, json=BODY | {"stream": True}) as answer:
        assert next(answer.iter_lines()) == "event: response.created"
    wait_for(lambda: worker.cancels == [worker.requests[0].id])
    with sessions() as session:
        assert session.scalar(select(StoredResponse.id)) is None


def test_cancel_and_streams_of_what_is_stored_are_refused_by_name(
    tenant: Tenant, worker: InferenceWorker
) -> None:
    path = f"{PATH}/{respond(tenant).json()['id']}"
    cancel = tenant.http.post(f"{path}/cancel")
    assert_refused(cancel, 400, code="unsupported_operation", param="response_id", says="background")
    for query, param in (("stream=true", "stream"), ("starting_after=3", "starting_after")):
        refused = tenant.http.get(f"{path}?{query}")
        assert_refused(refused, 400, code="unsupported_parameter", param=param)
    assert tenant.http.get(f"{path}?include[]=message.output_text.logprobs").status_code == 200
    assert_refused(tenant.http.post(f"{PATH}/compact"), 405, code="method_not_supported")

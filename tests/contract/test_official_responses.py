"""The official client over the Responses API, strict about every object and event."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from app.core.base_models import DEFAULT_BASE_MODEL
from app.core.completions import Chance, Delta, Finished, FinishReason, TokenChance
from tests.api.conftest import Tenant
from tests.api.workers import InferenceWorker, says

ASKED: dict[str, Any] = {"model": DEFAULT_BASE_MODEL, "input": "hi"}
TOOL: Any = {
    "type": "function",
    "name": "f",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    "strict": False,
}
CALL = ('Well.\n<tool_call>\n{"name": "f", "arguments": {"a"', ": 1}}\n</tool_call>")


class Ticket(BaseModel):
    """What the answer shall be."""

    urgency: str
    count: int


def test_a_response_is_made_found_gone_on_from_and_deleted(
    client: openai.OpenAI, worker: InferenceWorker
) -> None:
    first = client.responses.create(**ASKED, instructions="be kind", metadata={"a": "b"})
    assert (first.output_text, first.status, first.metadata) == ("Hello world", "completed", {"a": "b"})
    assert first.usage is not None
    assert (first.usage.input_tokens, first.usage.total_tokens) == (7, 9)
    assert client.responses.retrieve(first.id) == first
    second = client.responses.create(
        model=DEFAULT_BASE_MODEL, input="and?", previous_response_id=first.id, max_output_tokens=16
    )
    assert worker.requests[-1].messages == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Hello world"},
        {"role": "user", "content": "and?"},
    ]
    items = list(client.responses.input_items.list(second.id, limit=2))
    assert [item.type for item in items] == ["message"] * 3
    assert [getattr(item, "role", None) for item in items] == ["user", "assistant", "user"]
    assert list(client.responses.input_items.list(second.id, order="asc")) == items[::-1]
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**ASKED, previous_response_id=second.id)
    assert caught.value.code == "previous_response_not_found"


def test_a_stream_of_events_builds_the_response_that_is_stored(
    client: openai.OpenAI, worker: InferenceWorker
) -> None:
    worker.script = says(*CALL)
    events = list(client.responses.create(**ASKED, tools=[TOOL], stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    last: Any = events[-1]
    assert client.responses.retrieve(last.response.id) == last.response
    assert [item.type for item in last.response.output] == ["message", "function_call"]
    assert (last.response.output[1].name, last.response.output[1].arguments) == ("f", '{"a": 1}')


@pytest.mark.parametrize("tools", [[], [TOOL]])
def test_the_clients_stream_helper_agrees(
    client: openai.OpenAI, worker: InferenceWorker, tools: list[Any]
) -> None:
    worker.script = says(*CALL) if tools else says("Hello", " world")
    with client.responses.stream(**ASKED, tools=tools) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.output_text == ("Well." if tools else "Hello world")
    assert kinds[-1] == "response.completed"
    found = client.responses.retrieve(final.id)
    assert (found.id, found.usage, len(found.output)) == (final.id, final.usage, 1 + len(tools))


def test_parse_gives_the_model_class_that_was_asked_for(
    client: openai.OpenAI, worker: InferenceWorker
) -> None:
    worker.script = says('{"urgency": "high", ', '"count": 2}')
    answer = client.responses.parse(**ASKED, text_format=Ticket)
    assert answer.output_parsed == Ticket(urgency="high", count=2)
    assert "urgency" in (worker.requests[0].grammar or "")
    with client.responses.stream(**ASKED, text_format=Ticket) as stream:
        assert stream.get_final_response().output_parsed == Ticket(urgency="high", count=2)


def test_parse_reads_the_arguments_of_a_tool(client: openai.OpenAI, worker: InferenceWorker) -> None:
    arguments = '{"urgency": "low", "count": 1}'
    worker.script = says(f'<tool_call>{{"name": "Ticket", "arguments": {arguments}}}</tool_call>')
    tool: Any = openai.pydantic_function_tool(Ticket)
    answer = client.responses.parse(**ASKED, tools=[tool])
    [call] = answer.output
    assert call.type == "function_call"
    assert call.parsed_arguments == Ticket(urgency="low", count=1)
    assert worker.requests[0].grammar is not None


def test_a_conversation_goes_on_with_the_output_of_a_function(
    client: openai.OpenAI, worker: InferenceWorker
) -> None:
    worker.script = says(*CALL)
    first = client.responses.create(**ASKED, tools=[TOOL])
    call: Any = first.output[1]
    worker.script = says("It is 42.")
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "42"}
    second = client.responses.create(
        model=DEFAULT_BASE_MODEL, input=[output], previous_response_id=first.id, tools=[TOOL]
    )
    told = worker.requests[-1].messages
    again: Any = [{"role": "user", "content": "hi"}, *first.output, output]
    third = client.responses.create(model=DEFAULT_BASE_MODEL, input=again, tools=[TOOL])
    assert worker.requests[-1].messages == told
    assert [message["role"] for message in told] == ["user", "assistant", "tool"]
    assert (second.output_text, third.output_text) == ("It is 42.", "It is 42.")
    kinds = [item.type for item in client.responses.input_items.list(second.id, order="asc")]
    assert kinds == ["message", "message", "function_call", "function_call_output"]


def test_an_answer_cut_by_its_limit_is_incomplete(client: openai.OpenAI, worker: InferenceWorker) -> None:
    worker.script = says("Hel", reason=FinishReason.LENGTH)
    whole = client.responses.create(**ASKED)
    events = list(client.responses.create(**ASKED, stream=True))
    last: Any = events[-1]
    assert last.type == "response.incomplete"
    for answer in (whole, last.response, client.responses.retrieve(whole.id)):
        assert (answer.status, answer.output[0].status) == ("incomplete", "incomplete")
        assert answer.incomplete_details.reason == "max_output_tokens"


def test_log_probabilities_come_with_the_text(client: openai.OpenAI, worker: InferenceWorker) -> None:
    top = Chance(token="Hi", bytes=(72, 105), logprob=-0.25)
    said = Delta(index=0, text="Hi", logprobs=(TokenChance(**top.model_dump(), top_logprobs=(top,)),))
    end = Finished(index=0, reason=FinishReason.STOP, prompt_tokens=1, completion_tokens=1)
    worker.script = lambda _: [[said, end]]
    asked: dict[str, Any] = {**ASKED, "include": ["message.output_text.logprobs"], "top_logprobs": 1}
    whole: Any = client.responses.create(**asked)
    assert whole.output[0].content[0].logprobs[0].top_logprobs[0].logprob == -0.25
    with client.responses.stream(**asked) as stream:
        streamed: Any = stream.get_final_response()
    assert streamed.output[0].content[0].logprobs == whole.output[0].content[0].logprobs
    assert worker.requests[0].sampling.top_logprobs == 1


async def _ask(tenant: Tenant, url: str) -> tuple[str, str]:
    async with openai.AsyncOpenAI(
        api_key=tenant.secret, base_url=f"{url}/v1", _strict_response_validation=True
    ) as client:
        whole = await client.responses.create(**ASKED)
        async with client.responses.stream(**ASKED) as stream:
            final = await stream.get_final_response()
        return whole.output_text, final.output_text


def test_the_asynchronous_client_gets_the_same(
    tenant: Tenant, server_url: str, worker: InferenceWorker
) -> None:
    assert asyncio.run(_ask(tenant, server_url)) == ("Hello world", "Hello world")

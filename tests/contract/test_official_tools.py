"""The official client's own helpers over tools and formats: its types and parsers must agree with ours."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from pydantic import BaseModel

from app.core.base_models import DEFAULT_BASE_MODEL
from app.core.completions import FinishReason
from tests.api.workers import InferenceWorker, says

ASKED: dict[str, Any] = {"model": DEFAULT_BASE_MODEL, "messages": [{"role": "user", "content": "hi"}]}


class Ticket(BaseModel):
    """What the answer shall be."""

    urgency: str
    count: int


def test_parse_gives_the_model_class_that_was_asked_for(
    client: openai.OpenAI, worker: InferenceWorker
) -> None:
    worker.script = says('{"urgency": "high", ', '"count": 2}')
    answer = client.chat.completions.parse(**ASKED, response_format=Ticket)
    assert answer.choices[0].message.parsed == Ticket(urgency="high", count=2)
    assert "urgency" in (worker.requests[0].grammar or "")
    worker.script = says('{"urgency": "hi', reason=FinishReason.LENGTH)
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(**ASKED, response_format=Ticket)


def test_parse_reads_the_arguments_of_a_strict_tool(client: openai.OpenAI, worker: InferenceWorker) -> None:
    tool = openai.pydantic_function_tool(Ticket, name="open_ticket")
    worker.script = says(
        '<tool_call>{"name": "open_ticket", "arguments": {"urgency": "low", "count": 1}}</tool_call>'
    )
    answer = client.chat.completions.parse(**ASKED, tools=[tool])
    calls = answer.choices[0].message.tool_calls
    assert calls is not None
    assert calls[0].function.parsed_arguments == Ticket(urgency="low", count=1)
    assert worker.requests[0].grammar is not None


def test_the_stream_helper_gathers_calls(client: openai.OpenAI, worker: InferenceWorker) -> None:
    worker.script = says('Well.\n<tool_call>\n{"name": "f", "arguments": {"a"', ": [1]}}\n</tool_call>")
    tools: Any = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    with client.chat.completions.stream(**ASKED, tools=tools) as stream:
        kinds = {event.type for event in stream}
        choice = stream.get_final_completion().choices[0]
    assert "tool_calls.function.arguments.done" in kinds
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Well."
    assert choice.message.tool_calls is not None
    assert choice.message.tool_calls[0].function.arguments == '{"a": [1]}'


def test_a_conversation_goes_on_with_the_answer_of_a_tool(
    client: openai.OpenAI, worker: InferenceWorker
) -> None:
    worker.script = says('<tool_call>{"name": "f", "arguments": {}}</tool_call>')
    tools: Any = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    message = client.chat.completions.create(**ASKED, tools=tools).choices[0].message
    assert message.tool_calls is not None
    worker.script = says("It is 42.")
    answer: Any = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "42"}
    messages: Any = [*ASKED["messages"], message, answer]
    final = client.chat.completions.create(model=DEFAULT_BASE_MODEL, messages=messages, tools=tools)
    assert (final.choices[0].message.content, final.choices[0].finish_reason) == ("It is 42.", "stop")

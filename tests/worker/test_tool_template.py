"""The built-in model's template: its own words without tools, calls in the form that the API reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from app.core.base_models import DEFAULT_BASE_MODEL, load_catalogue
from app.core.tool_calls import Arguments, Begin, CallReader
from tests.tiny import build_tiny_model
from worker.base_model import load_tokenizer
from worker.chat_template import ChatTemplate

# SmolLM2-135M-Instruct's tokenizer_config.json, key chat_template
OWN = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
    "trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ASKED: list[dict[str, Any]] = [{"role": "user", "content": " Is it warm? \n"}]
TOOLS: list[dict[str, Any]] = [{"type": "function", "function": {"name": "look", "parameters": {}}}]


def call(name: str, **arguments: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {"id": name, "type": "function", "function": function}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = build_tiny_model(tmp_path_factory.mktemp("tiny"))
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def template(tokenizer: Any) -> ChatTemplate:
    return ChatTemplate(tokenizer, load_catalogue().entries[DEFAULT_BASE_MODEL].chat_template)


@pytest.mark.parametrize(
    "messages",
    [
        ASKED,
        [{"role": "system", "content": ""}, *ASKED],
        [*ASKED, {"role": "assistant", "content": " Yes.\n"}, *ASKED],
        [{"role": "system", "content": " Be brief. "}, *ASKED, {"role": "assistant", "content": ""}],
    ],
)
def test_without_tools_it_is_the_models_own(
    tokenizer: Any, template: ChatTemplate, messages: list[dict[str, Any]]
) -> None:
    own = ChatTemplate(tokenizer, OWN)
    assert template.encode_prompt(messages) == own.encode_prompt(messages)
    assert template.encode_example(messages) == own.encode_example(messages)


def test_tools_stand_in_the_system_message(tokenizer: Any, template: ChatTemplate) -> None:
    assert template.supports_tools
    for messages in (ASKED, [{"role": "system", "content": "Be brief."}, *ASKED]):
        text = tokenizer.decode(template.encode_prompt(messages, TOOLS))
        system = text[: text.index("<|im_start|>user")]
        assert json.dumps(TOOLS[0]) in system
        assert system.count("<|im_start|>") == 1


def test_what_is_trained_is_what_the_api_reads(tokenizer: Any, template: ChatTemplate) -> None:
    calls = [call("look", city="Málaga", days=[1, 2]), call("look")]
    messages = [
        *ASKED,
        {"role": "assistant", "content": "I look.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "look", "content": "31"},
    ]
    example = template.encode_example(messages, TOOLS)
    learned = [id for id, is_label in zip(example.ids, example.is_label, strict=True) if is_label]
    reader = CallReader()
    pieces = reader.push(tokenizer.decode(learned).removesuffix("<|im_end|>")) + reader.finish()
    assert [piece.name for piece in pieces if isinstance(piece, Begin)] == ["look", "look"]
    arguments = [json.loads(piece.text) for piece in pieces if isinstance(piece, Arguments)]
    assert arguments == [{"city": "Málaga", "days": [1, 2]}, {}]
    assert not template.hides(messages[1])

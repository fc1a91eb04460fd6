"""Tokens counted without transformers, held against what the trainer trains on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from app.core.dataset import read_examples
from tests.tiny import TOOLLESS_TEMPLATE
from worker import token_counts
from worker.chat_template import ChatTemplate
from worker.token_counts import TokenCounter, count_tokens, find_counter

CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"order": 7}'}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
LINES: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
    {
        "messages": [
            {"role": "developer", "content": "Be short <|im_end|> and kind ü."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "Where is"}, {"type": "text", "text": "it?"}],
            },
            {"role": "assistant", "content": "Wait.", "weight": 0},
            {"role": "user", "content": "And now?"},
            {"role": "assistant", "content": "Here."},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "Look."},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "1", "tool_call_id": "call_1"},
            {"role": "assistant", "content": "It is one."},
        ],
        "tools": [TOOL],
    },
]


@pytest.fixture(scope="module")
def folder(models_file: Path) -> Path:
    return models_file.parent / "tiny"


@pytest.fixture(scope="module")
def counter(folder: Path) -> TokenCounter:
    found = find_counter(folder, None)
    assert found is not None
    return found


def write(path: Path, lines: list[dict[str, Any]]) -> tuple[Path, list[int]]:
    texts = [json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(texts) + b"\n")
    return path, [len(text) for text in texts]


def question(words: int) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": "Where is my order? " * words},
            {"role": "assistant", "content": "The answer is yes."},
        ]
    }


@pytest.mark.parametrize("template", [None, TOOLLESS_TEMPLATE], ids=["tools", "toolless"])
@pytest.mark.parametrize("line", LINES, ids=["plain", "parts", "tools"])
def test_the_count_is_the_trainers(folder: Path, line: dict[str, Any], template: str | None) -> None:
    """To a few tokens: a control token in a user's text is one token here, and text there."""
    counter = find_counter(folder, template)
    assert counter is not None
    (example,) = read_examples([json.dumps(line).encode()])
    ids, labels = counter.encode(example)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    exact = ChatTemplate(tokenizer, template).encode_example(example.messages, example.tools)
    if "<|im_end|>" not in json.dumps(line):
        assert ids == exact.ids
    assert len(ids) == pytest.approx(len(exact.ids), abs=8)
    if template is None and "tools" not in line:
        assert labels == sum(exact.is_label)


def test_each_example_counts_up_to_the_jobs_length(tmp_path: Path, counter: TokenCounter) -> None:
    path, lengths = write(tmp_path / "a.jsonl", [question(1), question(50)])
    whole = count_tokens(path, lengths, counter=counter, max_length=10_000, shares=True)
    cut = count_tokens(path, lengths, counter=counter, max_length=60, shares=False)
    assert whole is not None
    assert cut is not None
    assert (whole.examples, len(whole.rows)) == (2, 2)
    assert max(row.tokens for row in whole.rows) > 200
    assert sorted(row.tokens for row in cut.rows)[-1] == 60
    assert cut.tokens == sum(row.tokens for row in cut.rows) < whole.tokens


def test_rows_that_begin_alike_have_fewer_tokens_of_their_own(tmp_path: Path, counter: TokenCounter) -> None:
    path, lengths = write(tmp_path / "a.jsonl", [question(20), question(21)])
    counted = count_tokens(path, lengths, counter=counter, max_length=10_000, shares=True)
    assert counted is not None
    first, second = counted.rows
    assert first.own == first.tokens
    assert second.own < second.tokens / 4


def test_of_a_long_file_a_sample_is_counted_with_its_longest_lines(
    tmp_path: Path, counter: TokenCounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [question(1 + number * 5 % 11) for number in range(400)]
    lines[17] = question(90)
    path, lengths = write(tmp_path / "a.jsonl", lines)
    every = count_tokens(path, lengths, counter=counter, max_length=300, shares=False)
    monkeypatch.setattr(token_counts, "LONGEST", 4)
    monkeypatch.setattr(token_counts, "SPREAD", 60)
    sample = count_tokens(path, lengths, counter=counter, max_length=300, shares=False)
    assert every is not None
    assert sample is not None
    assert len(every.rows) == sample.examples == 400
    assert len(sample.rows) < 70
    assert max(row.tokens for row in sample.rows) == 300
    assert sample.tokens == pytest.approx(every.tokens, rel=0.05)


def test_what_cannot_be_read_or_rendered_is_not_counted(tmp_path: Path, folder: Path) -> None:
    assert find_counter(tmp_path, None) is None
    assert find_counter(folder, "{% if %}") is None
    strict = find_counter(folder, "{{ raise_exception('no') }}")
    path, lengths = write(tmp_path / "a.jsonl", [question(1)])
    assert strict is not None
    assert count_tokens(path, lengths, counter=strict, max_length=100, shares=True) is None

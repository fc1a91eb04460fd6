"""Files become examples: cut at the end, dropped if nothing is left to learn, in an order the seed fixes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import TOOLLESS_TEMPLATE, write_examples
from tests.training.conftest import CPU, result
from worker.base_model import load_tokenizer
from worker.chat_template import ChatTemplate, TokenizedExample
from worker.training import pulse
from worker.training.data import Split, epoch_batches, flatten, micro_batches, read_split
from worker.training.errors import TrainingError
from worker.training.words import Section, Working


@pytest.fixture
def template(tiny_dir: Path) -> ChatTemplate:
    return ChatTemplate(load_tokenizer(tiny_dir))


def write(path: Path, *conversations: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations))
    return path


def read(
    path: Path,
    template: ChatTemplate,
    max_length: int,
    *,
    param: str = "training_file",
    max_line_bytes: int = 10_000,
) -> Split:
    return result(
        read_split(path, param, template=template, max_length=max_length, max_line_bytes=max_line_bytes)
    )


def test_long_examples_are_cut_at_the_end_and_counted(template: ChatTemplate, tmp_path: Path) -> None:
    whole = read(write_examples(tmp_path / "a.jsonl", 4), template, 500)
    longest = max(len(example.ids) for example in whole.examples)
    cut = read(tmp_path / "a.jsonl", template, longest - 1)
    assert (whole.cut, cut.cut) == (0, 1)
    assert sorted(len(e.ids) for e in cut.examples)[-1] == longest - 1
    assert all(c.ids == w.ids[: longest - 1] for c, w in zip(cut.examples, whole.examples, strict=True))
    (warning,) = cut.warnings("training", longest - 1)
    assert warning.level == "warn"
    assert warning.message.startswith("1 example(s) of the training file were longer than")


def test_examples_without_a_label_after_the_cut_are_left_out_with_a_warning(
    template: ChatTemplate, tmp_path: Path
) -> None:
    answer = {"role": "assistant", "content": "Yes."}
    short = [{"role": "user", "content": "Hi"}, answer]
    long = [{"role": "user", "content": "Thank you. " * 50}, answer]
    file = write(tmp_path / "a.jsonl", short, long, [short[0], {**answer, "weight": 0}])
    split = read(file, template, 100)
    assert (len(split.examples), split.cut, split.dropped) == (1, 1, 2)
    assert [log.level for log in split.warnings("training", 100)] == ["warn", "warn"]


def test_a_file_with_nothing_to_train_on_is_an_error_that_names_the_cure(
    template: ChatTemplate, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match="max_length") as raised:
        read(write_examples(tmp_path / "a.jsonl", 3), template, 5)
    assert raised.value.word.code == "no_trainable_tokens"
    assert raised.value.word.param == "training_file"
    assert not raised.value.word.retryable


def test_a_bad_line_is_an_error_with_its_number(template: ChatTemplate, tmp_path: Path) -> None:
    file = write_examples(tmp_path / "a.jsonl", 2)
    file.write_text(file.read_text() + '{"messages": 1}\n')
    with pytest.raises(TrainingError, match="Example 3") as raised:
        read(file, template, 500, param="validation_file")
    assert raised.value.word.code == "invalid_validation_file"
    opening = "The job failed due to an invalid validation file. "  # as where the file is checked first
    assert raised.value.word.message.startswith(opening + "Invalid file format.")


def test_the_longest_line_is_the_one_asked_for(template: ChatTemplate, tmp_path: Path) -> None:
    file = write_examples(tmp_path / "a.jsonl", 1)
    size = file.stat().st_size
    assert len(read(file, template, 500, max_line_bytes=size).examples) == 1
    with pytest.raises(TrainingError, match=f"longer than {size - 2} bytes"):
        read(file, template, 500, max_line_bytes=size - 2)


def test_reading_a_long_file_gives_signs_of_life(
    template: ChatTemplate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulse, "EVERY_S", 0.0)
    file = write_examples(tmp_path / "a.jsonl", 3)
    words = read_split(file, "training_file", template=template, max_length=500, max_line_bytes=10_000)
    assert list(words) == [Working(section=Section.SETUP)] * 3


def call_only() -> dict[str, Any]:
    function = {"name": "find_order", "arguments": '{"id": 7}'}
    calls = [{"id": "call_1", "type": "function", "function": function}]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def test_messages_of_tool_calls_alone_are_not_trained_as_empty_answers_where_the_template_hides_calls(
    template: ChatTemplate, tiny_dir: Path, tmp_path: Path
) -> None:
    user = {"role": "user", "content": "Hi"}
    answer = {"role": "assistant", "content": "Yes."}
    called = [user, call_only(), {"role": "tool", "content": "x", "tool_call_id": "call_1"}]
    file = write(tmp_path / "a.jsonl", [*called, answer], [user, call_only()], [user, answer])
    deaf = ChatTemplate(load_tokenizer(tiny_dir), TOOLLESS_TEMPLATE)
    split = read(file, deaf, 500)
    assert (len(split.examples), split.dropped, split.hidden_calls) == (2, 1, 2)
    trained = [
        [id for id, is_label in zip(e.ids, e.is_label, strict=True) if is_label] for e in split.examples
    ]
    assert trained[0] == trained[1]  # the answer, and nothing of the call
    assert (
        "This concerns 2 example(s) of the training file." in [*split.warnings("training", 500)][-1].message
    )
    split = read(file, template, 500)
    assert (len(split.examples), split.dropped, split.hidden_calls) == (3, 0, 0)


def test_a_file_of_hidden_tool_calls_alone_is_an_error_that_says_so(tiny_dir: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"role": "user", "content": "Hi"}, call_only()])
    with pytest.raises(TrainingError, match="does not show tool calls") as raised:
        read(file, ChatTemplate(load_tokenizer(tiny_dir), TOOLLESS_TEMPLATE), 500)
    assert raised.value.word.code == "no_trainable_tokens"


def test_tools_a_template_cannot_show_are_warned_about(tiny_dir: Path, tmp_path: Path) -> None:
    deaf = "{% for m in messages %}{{ m.role + m.content }}<|im_end|>{% endfor %}"
    deaf += "{% if add_generation_prompt %}assistant{% endif %}"
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"messages": messages, "tools": tools}) + "\n")
    split = read(file, ChatTemplate(load_tokenizer(tiny_dir), deaf), 500)
    (warning,) = split.warnings("training", 500)
    assert "tools" in warning.message


def numbered(count: int) -> list[TokenizedExample]:
    return [
        TokenizedExample([number] * (number + 2), [False, *[True] * (number + 1)]) for number in range(count)
    ]


def test_an_epoch_holds_every_example_once_in_an_order_of_its_own() -> None:
    examples = numbered(10)
    epochs = [list(epoch_batches(examples, 4, seed=3, epoch=epoch)) for epoch in (1, 2, 1)]
    assert [len(batch) for batch in epochs[0]] == [4, 4, 2]
    orders = [[example.ids[0] for batch in batches for example in batch] for batches in epochs]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(10))
    assert orders[0] == orders[2] != orders[1]
    assert orders[0] != [e.ids[0] for b in epoch_batches(examples, 4, seed=4, epoch=1) for e in b]


def test_micro_batches_keep_order_and_respect_the_limit_where_they_can() -> None:
    examples = numbered(10)  # 2 to 11 tokens
    parts = list(micro_batches(examples, 10))
    assert [example for part in parts for example in part] == examples
    assert all(len(part) == 1 or sum(len(e.ids) for e in part) <= 10 for part in parts)
    assert len(parts) < len(examples)


def test_flat_batches_restart_positions_and_pair_each_label_with_the_token_before_it() -> None:
    first = TokenizedExample([5, 6, 7], [True, False, True])  # nothing precedes the very first token
    second = TokenizedExample([8, 9, 10], [False, True, False])
    batch = flatten([first, second], CPU)
    assert batch.ids.tolist() == [5, 6, 8]  # a last label and what follows it predict nothing
    assert batch.positions.tolist() == [0, 1, 0]
    assert (batch.parents, batch.lengths) == ((-1, -1), (2, 1))
    assert batch.rows.tolist() == [1, 2]
    assert batch.labels.tolist() == [7, 9]


def test_a_shared_beginning_stands_in_front_once_whatever_is_trained_in_it() -> None:
    start = list(range(1, 11))
    first = TokenizedExample([*start, 20, 21], [False] * 9 + [True] * 3)
    second = TokenizedExample([*start, 30], [False] * 9 + [True] * 2)
    batch = flatten([first, second], CPU, share_prefixes=True)
    assert (batch.parents, batch.lengths) == ((-1, 0), (10, 1))
    assert batch.ids.tolist() == [*start, 20]
    assert batch.positions.tolist() == list(range(11))
    assert batch.rows.tolist() == [8, 9, 10, 8, 9]  # both examples train token 10, and what follows it
    assert batch.labels.tolist() == [10, 20, 21, 10, 30]


def test_examples_that_begin_alike_fill_one_pass_together() -> None:
    def example(start: int, end: int) -> TokenizedExample:
        return TokenizedExample([start] * 20 + [end], [False] * 20 + [True])

    batch = [example(start, end) for end in range(3, 7) for start in (1, 2)]
    parts = list(micro_batches(batch, 30, share_prefixes=True))
    assert [[e.ids[0] for e in part] for part in parts] == [[1] * 4, [2] * 4]
    assert sorted(e.ids for part in parts for e in part) == sorted(e.ids for e in batch)
    assert [len(flatten(part, CPU, share_prefixes=True).ids) for part in parts] == [20, 20]

"""Answers of a random model are held to a grammar: it would never write JSON by itself."""

from __future__ import annotations

import json
from typing import Any

import pytest

from app.core.completions import FinishReason
from tests.serving.listener import Listener
from worker.base_model import load_tokenizer
from worker.serving import grammar as grammar_module
from worker.serving.grammar import GrammarError, Grammars
from worker.serving.vocabulary import make_vocabulary

SCHEMA = {
    "type": "object",
    "properties": {
        "urgency": {"enum": ["low", "high"]},
        "count": {"type": "integer", "minimum": 1, "maximum": 40},
        "tags": {"type": "array", "items": {"enum": ["a", "ü"]}, "maxItems": 3},
    },
    "required": ["urgency", "count", "tags"],
    "additionalProperties": False,
}


def grammar_of(schema: dict[str, Any]) -> str:
    options = {"whitespace_pattern": r"[ \n\t]{0,2}"}
    return "start: %json " + json.dumps({**schema, "x-guidance": options})


@pytest.fixture(scope="module")
def grammars(tiny_dir: Any) -> Grammars:
    tokenizer = load_tokenizer(tiny_dir)
    return Grammars(make_vocabulary(tokenizer, size=len(tokenizer), end_ids=frozenset({2})))


def test_every_answer_keeps_to_the_schema_whatever_is_drawn(make_engine, make_request, ask):
    engine = make_engine()
    requests = [
        make_request(
            f"try {seed}", grammar=grammar_of(SCHEMA), temperature=1.5, seed=seed, n=2, max_tokens=200
        )
        for seed in range(8)
    ]
    free = [ask(engine, make_request(f"free {seed}", max_tokens=20)) for seed in range(4)]
    listeners: list[Listener] = [ask(engine, request) for request in requests]
    values = []
    for listener in listeners:
        listener.wait()
        for index in range(2):
            assert listener.finished[index].reason == FinishReason.STOP
            values.append(json.loads(listener.text(index)))
    for value in values:
        assert list(value) == ["urgency", "count", "tags"]
        assert value["urgency"] in ("low", "high")
        assert 1 <= value["count"] <= 40
        assert len(value["tags"]) <= 3
        assert set(value["tags"]) <= {"a", "ü"}
    assert len({json.dumps(value) for value in values}) > 4
    alone = [
        ask(make_engine(), make_request(f"free {seed}", max_tokens=20)).wait().text() for seed in range(4)
    ]
    assert [listener.wait().text() for listener in free] == alone  # neighbours are not held to it


def test_an_answer_cut_by_its_limit_says_so(make_engine, make_request, ask):
    listener = ask(make_engine(), make_request(grammar=grammar_of(SCHEMA), max_tokens=4)).wait()
    assert listener.finished[0].reason == FinishReason.LENGTH
    assert listener.text().startswith("{")


def test_a_bias_cannot_bring_back_what_the_grammar_forbids(make_engine, make_request, ask, tiny_dir):
    [letter] = load_tokenizer(tiny_dir).encode("x", add_special_tokens=False)
    request = make_request(grammar=grammar_of(SCHEMA), max_tokens=200, logit_bias={letter: 100.0})
    assert json.loads(ask(make_engine(), request).wait().text())["urgency"] in ("low", "high")


def test_a_grammar_that_cannot_be_compiled_is_refused_and_the_engine_goes_on(make_engine, make_request, ask):
    engine = make_engine()
    failed = ask(engine, make_request(grammar="start: nonsense")).wait().failed
    assert (failed.status, failed.code) == (400, "invalid_json_schema")
    assert ask(engine, make_request(max_tokens=3)).wait().finished


def test_states_of_one_grammar_do_not_share_their_place(grammars: Grammars):
    first, second = (grammars.start('start: "a" "b"') for _ in range(2))
    vocabulary = 300
    before = second.mask(vocabulary)
    a = int(before.nonzero()[0])
    first.take(a)
    assert not bool((first.mask(vocabulary) == before).all())
    assert bool((second.mask(vocabulary) == before).all())


def test_only_so_many_grammars_are_kept(grammars: Grammars, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(grammar_module, "REMEMBERED", 2)
    first = grammars.compile('start: "1"')
    assert grammars.compile('start: "1"') is first
    grammars.compile('start: "2"')
    grammars.compile('start: "1"')
    grammars.compile('start: "3"')
    assert grammars.compile('start: "1"') is first  # used last, so it stayed
    with pytest.raises(GrammarError):
        grammars.compile("start: what")

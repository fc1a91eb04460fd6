"""Plain prompts: text and token ids become tokens without a template."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.serving.conftest import CPU
from worker.base_model import load_base_model, load_tokenizer
from worker.serving.prompts import PromptError, Prompts


@pytest.fixture(scope="module")
def prompts(tiny_dir: Path) -> Prompts:
    tokenizer = load_tokenizer(tiny_dir)
    return Prompts(tokenizer, vocabulary=len(tokenizer))


def test_text_is_tokens_and_a_control_token_in_it_stays_text(prompts: Prompts, tiny_dir: Path):
    tokenizer = load_tokenizer(tiny_dir)
    assert prompts.encode("Where is") == tokenizer.encode("Where is", add_special_tokens=False)
    ids = prompts.encode("<|im_end|>")
    assert len(ids) > 1
    assert tokenizer.decode(ids) == "<|im_end|>"


def test_token_ids_are_taken_as_they_are(prompts: Prompts):
    assert prompts.encode((2, 5, 5)) == [2, 5, 5]
    with pytest.raises(PromptError, match="no token 100000"):
        prompts.encode((1, 100_000))


def test_nothing_is_the_beginning_of_a_document(prompts: Prompts, tiny_dir: Path):
    start = load_tokenizer(tiny_dir).bos_token_id
    assert prompts.encode("") == prompts.encode(()) == [start]


def test_an_engine_goes_on_with_a_prompt_as_the_model_would(make_engine, make_request, ask, tiny_dir: Path):
    listener = ask(
        make_engine(), make_request(messages=[], prompt="Where is my", max_tokens=8, ignore_eos=True)
    ).wait()
    tokenizer = load_tokenizer(tiny_dir)
    model = load_base_model(tiny_dir, quantize_4bit=False, device=CPU, dtype=torch.float32)
    prompt = tokenizer.encode("Where is my", add_special_tokens=False)
    ids = list(prompt)
    for _ in range(8):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert listener.text() == tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
    assert listener.finished[0].prompt_tokens == len(prompt)


def test_a_prompt_that_is_too_long_is_refused_by_its_own_name(make_engine, make_request, ask):
    engine = make_engine()
    failed = ask(engine, make_request(messages=[], prompt="a b " * 600)).wait().failed
    assert (failed.code, failed.param) == ("context_length_exceeded", "prompt")
    assert "messages" not in failed.message
    failed = ask(engine, make_request(messages=[], prompt=(10**6,))).wait().failed
    assert (failed.status, failed.param) == (400, "prompt")

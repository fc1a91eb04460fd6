"""Adapters trained to one word each: whatever shares a batch and whoever left a slot, no foreign word."""

from __future__ import annotations

import random

import pytest
import torch
from peft import LoraConfig, get_peft_model

from app.core.completions import TunedWeights, WeightsKind
from app.core.manifest import write_manifest
from tests.serving.conftest import CPU, quiet_peft
from tests.serving.listener import Listener
from worker.base_model import load_base_model, load_tokenizer
from worker.chat_template import ChatTemplate

WORDS = ["amber", "birch", "cobalt", "delta", "ember", "fjord", "garnet"]
QUESTIONS = ["Hello", "Where is my order?", "I want my money back.", "Thank you. " * 9, "0123456789 " * 4]
REQUESTS = 1000
TOKENS = 10  # more than any of the words has


def train(tiny_dir, folder, word: str, rank: int) -> TunedWeights:
    """An adapter that answers every question with its word, by plain peft and a plain loop."""
    template = ChatTemplate(load_tokenizer(tiny_dir))
    base = load_base_model(tiny_dir, quantize_4bit=False, device=CPU, dtype=torch.float32)
    torch.manual_seed(len(word))
    with quiet_peft():
        model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    examples = []
    for question in QUESTIONS:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": word}]
        example = template.encode_example(turns)
        ids, is_label = torch.tensor([example.ids]), torch.tensor([example.is_label])
        examples.append((ids, torch.where(is_label, ids, -100)))
    for _ in range(60):
        losses = [model(input_ids=ids, labels=labels).loss for ids, labels in examples]
        loss = torch.stack(losses).mean()
        if loss < 0.005:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with quiet_peft():
        model.save_pretrained(folder)
        write_manifest(folder)
    return TunedWeights(id=f"ft:{word}", kind=WeightsKind.LORA, path=str(folder))


@pytest.fixture(scope="module")
def canaries(tiny_dir, tmp_path_factory) -> dict[str, TunedWeights]:
    return {
        word: train(tiny_dir, tmp_path_factory.mktemp(word), word, rank=2 + 3 * index)
        for index, word in enumerate(WORDS)
    }


def test_a_thousand_mixed_requests_hear_no_foreign_word(canaries, make_engine, make_request, ask):
    """Room for about half of the adapters, so that they come and go; a seventh of the rows is the base."""
    engine = make_engine(max_batch=16, adapter_bytes=300_000)
    choose = random.Random(5)
    asked: list[tuple[str | None, Listener]] = []
    for _ in range(REQUESTS):
        word = choose.choice([None, *WORDS])
        request = make_request(
            choose.choice(QUESTIONS),
            tuned=canaries[word] if word else None,
            max_tokens=TOKENS,
            project_id=f"proj_{choose.randint(1, 3)}",
            expires_at=4e9,
        )
        asked.append((word, ask(engine, request)))
    heard = [(word, listener.wait().text()) for word, listener in asked]
    assert [(word, text) for word, text in heard if word is not None and text != word] == []
    assert {text for word, text in heard if word is None} & set(WORDS) == set()
    assert 0 < engine.stats().adapters < len(WORDS)
    assert engine.stats().errors == 0

"""Flat batches, labelled rows and micro-batches must change the speed of training and nothing else."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.training.conftest import CPU, result
from worker.base_model import load_base_model, load_tokenizer
from worker.chat_template import ChatTemplate, TokenizedExample
from worker.training.data import flatten
from worker.training.loss import loss_sums
from worker.training.model import TunedModel, WarmBase, tuned_model
from worker.training.pulse import Pulse
from worker.training.step import backward
from worker.training.words import Adapter, Section, TrainSpec

# peft 0.21 asks transformers 5.23 for an attribute under its old name
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

CONVERSATIONS = [
    [("user", "Where is my order?"), ("assistant", "The answer is yes.")],
    [
        ("user", "Hello"),
        ("assistant", "Yes"),
        ("user", "I want my money back " * 9),
        ("assistant", "Thank you!"),
    ],
    [("system", "You answer."), ("user", "0123456789"), ("assistant", '{"intent": "refund"}')],
]


@pytest.fixture
def batch(tiny_dir: Path) -> list[TokenizedExample]:
    template = ChatTemplate(load_tokenizer(tiny_dir))
    return [
        template.encode_example([{"role": role, "content": content} for role, content in turns])
        for turns in CONVERSATIONS
    ]


def padded_reference(model: torch.nn.Module, batch: list[TokenizedExample]) -> torch.Tensor:
    """The plain loop: right padding, an attention mask, labels of -100, transformers' own loss."""
    longest = max(len(example.ids) for example in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for row, example in enumerate(batch):
        length = len(example.ids)
        ids[row, :length] = torch.tensor(example.ids)
        mask[row, :length] = 1
        wanted = torch.tensor(example.is_label)
        labels[row, :length] = torch.where(wanted, ids[row, :length], -100)
    return model(input_ids=ids, attention_mask=mask, labels=labels).loss


def peft_reference(tiny_dir: Path, spec: TrainSpec) -> torch.nn.Module:
    base = load_base_model(
        tiny_dir, quantize_4bit=spec.adapter is Adapter.QLORA, device=CPU, dtype=torch.float32
    )
    if spec.adapter is Adapter.FULL:
        return base.requires_grad_(True)
    config = LoraConfig(
        r=spec.rank, lora_alpha=spec.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(base, config)


def many_turns(tiny_dir: Path) -> list[TokenizedExample]:
    """A tree: two system prompts, conversations kept after each of their turns, one row twice."""
    template = ChatTemplate(load_tokenizer(tiny_dir))
    batch = []
    for system in ("You answer. " * 4, "You are a helpful assistant. " * 3):
        for subject in ("order", "kettle"):
            messages = [{"role": "system", "content": system}]
            for turn in range(3):
                messages.append({"role": "user", "content": f"Where is my {subject} {turn}?"})
                messages.append({"role": "assistant", "content": f"The {subject} is yes {turn * 7}."})
                batch.append(template.encode_example(list(messages)))
    return [*batch[::2], *batch[1::2], batch[4]]


def random_factors(tuned: TunedModel) -> None:
    """LoRA's second factor starts at zero; gradients are only telling once it is not."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in tuned.parameters:
            weight += torch.randn(weight.shape, generator=generator) * 0.02


@pytest.mark.parametrize("adapter", list(Adapter))
@pytest.mark.parametrize("max_tokens", [10_000, 60], ids=["one pass", "several passes"])
@pytest.mark.parametrize("shared", [False, True], ids=["", "shared prefixes"])
def test_loss_and_gradients_equal_a_plain_padded_peft_loop(
    tiny_dir: Path,
    warm: WarmBase,
    make_spec: Callable[..., TrainSpec],
    batch: list[TokenizedExample],
    adapter: Adapter,
    max_tokens: int,
    shared: bool,
) -> None:
    if shared:
        batch = many_turns(tiny_dir)
    spec = make_spec(adapter=adapter)
    with tuned_model(spec, warm) as tuned:
        tuned.max_tokens = max_tokens
        tuned.model.train()
        random_factors(tuned)
        loss, _ = result(backward(tuned, batch, Pulse(Section.STEP), threading.Event()))

        reference = peft_reference(tiny_dir, spec).train()
        theirs = [weight for weight in reference.parameters() if weight.requires_grad]
        with torch.no_grad():
            for mine, their in zip(tuned.parameters, theirs, strict=True):
                their.copy_(mine)
        expected = padded_reference(reference, batch)
        expected.backward()

        assert loss == pytest.approx(expected.item(), rel=1e-6)
        for mine, their in zip(tuned.parameters, theirs, strict=True):
            torch.testing.assert_close(mine.grad, their.grad, rtol=1e-4, atol=1e-6)
        assert any(weight.grad.abs().max() > 1e-4 for weight in tuned.parameters)


def test_loss_is_the_mean_negative_log_likelihood_of_labelled_tokens_and_no_others(
    tiny_dir: Path, warm: WarmBase, batch: list[TokenizedExample]
) -> None:
    plain = load_base_model(tiny_dir, quantize_4bit=False, device=CPU, dtype=torch.float32)
    expected, right, count = 0.0, 0, 0
    with torch.no_grad():
        for example in batch:
            probabilities = plain(input_ids=torch.tensor([example.ids])).logits[0].double().softmax(-1)
            for at in range(1, len(example.ids)):
                if example.is_label[at]:
                    expected -= probabilities[at - 1, example.ids[at]].log().item()
                    right += int(probabilities[at - 1].argmax().item() == example.ids[at])
                    count += 1
        sums = loss_sums(warm.take(str(tiny_dir), quantize_4bit=False), flatten(batch, CPU))
    assert sums.labels == count == sum(sum(example.is_label) for example in batch)
    assert sums.loss.item() == pytest.approx(expected, rel=1e-5)
    assert sums.correct.item() == right


def test_what_one_example_learns_does_not_depend_on_its_neighbours_in_the_batch(
    tiny_dir: Path, warm: WarmBase, batch: list[TokenizedExample]
) -> None:
    model = warm.take(str(tiny_dir), quantize_4bit=False)
    alone = [loss_sums(model, flatten([example], CPU)).loss for example in batch]
    together = loss_sums(model, flatten(batch, CPU)).loss
    backwards = loss_sums(model, flatten(batch[::-1], CPU)).loss
    torch.testing.assert_close(torch.stack(alone).sum(), together, rtol=1e-6, atol=0)
    torch.testing.assert_close(backwards, together, rtol=1e-6, atol=0)


def test_evaluation_leaves_nf4_weights_trainable(
    tiny_dir: Path, warm: WarmBase, make_spec: Callable[..., TrainSpec], batch: list[TokenizedExample]
) -> None:
    """bitsandbytes repacks weights for bfloat16 inference on some CPUs, after which gradients are lost."""
    with tuned_model(make_spec(adapter=Adapter.QLORA), warm) as tuned:
        tuned.model.train()
        random_factors(tuned)
        before, _ = result(backward(tuned, batch, Pulse(Section.STEP), threading.Event()))
        gradients = [weight.grad.clone() for weight in tuned.parameters]
        tuned.model.train(False)
        with torch.no_grad():
            tuned.sums(batch)
        tuned.model.train()
        for weight in tuned.parameters:
            weight.grad = None
        after, _ = result(backward(tuned, batch, Pulse(Section.STEP), threading.Event()))
        assert after == before
        assert all(torch.equal(w.grad, g) for w, g in zip(tuned.parameters, gradients, strict=True))

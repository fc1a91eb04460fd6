"""Every row of a mixed batch gets the tokens it would get alone from plain peft (greedy, float32)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from app.core.completions import CompletionRequest, TunedWeights
from app.core.manifest import write_manifest
from tests.serving.conftest import CPU, quiet_peft
from tests.serving.listener import until
from tests.tiny import CONTEXT_LENGTH, KV_TOKEN_BYTES
from worker.base_model import load_base_model, load_tokenizer
from worker.chat_template import ChatTemplate
from worker.serving.batch import GroupLimits, ModelGroup
from worker.serving.intake import Intake
from worker.serving.sequence import Sequence

TEXTS = [
    "Hello",
    "Where is my order? " * 12,
    "I want my money back.",
    "Thank you very much! " * 5,
    '{"intent": "refund"}',
    "0123456789 " * 20,
]


@pytest.fixture(scope="module")
def reference(tiny_dir: Path, adapters: list[TunedWeights]):
    """Plain peft, one request at a time."""
    base = load_base_model(tiny_dir, quantize_4bit=False, device=CPU, dtype=torch.float32)
    with quiet_peft():
        model = PeftModel.from_pretrained(base, adapters[0].path, adapter_name="ref0")
    for index, tuned in enumerate(adapters[1:], start=1):
        model.load_adapter(tuned.path, adapter_name=f"ref{index}")
    names = {tuned.id: f"ref{index}" for index, tuned in enumerate(adapters)}
    template = ChatTemplate(load_tokenizer(tiny_dir))

    def answer(request: CompletionRequest) -> list[int]:
        ids_1T = torch.tensor([template.encode_prompt(request.messages)])
        options = {"do_sample": False, "max_new_tokens": request.sampling.max_tokens}
        options["attention_mask"] = torch.ones_like(ids_1T)
        if request.tuned is None:
            with model.disable_adapter():
                output = model.generate(input_ids=ids_1T, **options)
        else:
            model.set_adapter(names[request.tuned.id])
            output = model.generate(input_ids=ids_1T, **options)
        made = output[0, ids_1T.shape[1] :].tolist()
        return [token_id for token_id in made if token_id != model.generation_config.eos_token_id]

    return answer


def make_group(tiny_dir: Path, **limits: int) -> tuple[ModelGroup, Intake]:
    model = load_base_model(tiny_dir, quantize_4bit=False, device=CPU, dtype=torch.float32)
    defaults = {"max_batch": 8, "kv_bytes": 8192 * KV_TOKEN_BYTES, "adapter_bytes": 10**9}
    group = ModelGroup(model, GroupLimits(**(defaults | limits)))
    return group, Intake(
        load_tokenizer(tiny_dir), model, chat_template=None, context_length=group.context_length
    )


def admit(group: ModelGroup) -> Sequence:
    """The next sequence, as soon as its adapter has been read."""
    admitted: list[Sequence] = []
    until(lambda: (sequence := group.admit()) is not None and not admitted.append(sequence))
    return admitted[0]


def start(group: ModelGroup) -> None:
    """Let the next sequence run."""
    sequence = admit(group)
    group.begin(sequence)
    group.prefill(sequence)


@torch.inference_mode()
def run(
    group: ModelGroup, intake: Intake, requests: list[CompletionRequest], *, limit: int | None = None
) -> list[list[int]]:
    """Answer all, one more choice joining at each step; their ids. `limit`: tokens a step of each prompt."""
    completions = [intake.open(request) for request in requests]
    choices = [(sequence, len(c.prompt_ids)) for c in completions for sequence in c.sequences]
    waiting = [sequence for sequence, _ in choices]
    while waiting or not group.idle:
        if waiting:
            group.queue.push(waiting.pop(0))
        while sequence := group.admit():
            group.begin(sequence)
            if limit is None and sequence in group.fillings:
                group.prefill(sequence)
        for sequence in list(group.fillings):
            group.prefill(sequence, limit)
        if group.rows:
            group.decode()
    return [sequence.ids[start:] for sequence, start in choices]


def mixed_requests(make_request, adapters: list[TunedWeights], count: int) -> list[CompletionRequest]:
    weights = [None, *adapters]
    return [
        make_request(TEXTS[i % len(TEXTS)], tuned=weights[i % len(weights)], max_tokens=6 + 7 * (i % 5))
        for i in range(count)
    ]


def test_rows_joining_over_time_get_the_tokens_they_get_alone(tiny_dir, make_request, adapters, reference):
    requests = mixed_requests(make_request, adapters, 24)
    got = run(*make_group(tiny_dir), requests)
    expected = [reference(request) for request in requests]
    assert got == expected
    assert len({tuple(ids[:6]) for ids in expected}) > 8  # the adapters and prompts do make a difference


@pytest.mark.parametrize("limit", [1, 7, 64])
def test_prompts_computed_in_parts_beside_running_rows_change_nothing(
    tiny_dir, make_request, adapters, reference, limit
):
    requests = [
        request.model_copy(update={"project_id": f"proj_{number % 3}"})
        for number, request in enumerate(mixed_requests(make_request, adapters, 12))
    ]
    for max_batch in (2, 6):
        group, intake = make_group(tiny_dir, max_batch=max_batch)
        assert run(group, intake, requests, limit=limit) == [reference(request) for request in requests]


def test_known_beginnings_of_prompts_change_nothing(tiny_dir, make_request, adapters, reference):
    requests = mixed_requests(make_request, adapters, 16)
    group, intake = make_group(tiny_dir, prefix_bytes=10**8)
    expected = [reference(request) for request in requests]
    assert run(group, intake, requests) == expected
    assert run(group, intake, requests, limit=16) == expected  # all known now
    assert group.prefixes.size_bytes > 0


def test_rows_sent_back_for_lack_of_memory_get_the_same_tokens(tiny_dir, make_request, adapters, reference):
    requests = mixed_requests(make_request, adapters, 10)
    requests += [make_request(text, max_tokens=150) for text in TEXTS]
    group, intake = make_group(tiny_dir, kv_bytes=700 * KV_TOKEN_BYTES)
    assert run(group, intake, requests) == [reference(request) for request in requests]
    assert group.preemptions > 0


def test_keys_and_values_take_no_more_memory_than_they_were_given(tiny_dir, make_request, adapters):
    kv_bytes = 1000 * KV_TOKEN_BYTES
    group, intake = make_group(tiny_dir, kv_bytes=kv_bytes)
    taken = []
    forward = group._forward

    def watch(*arguments):
        logits_BV = forward(*arguments)
        taken.append(sum(layer.keys_RHLD.nbytes + layer.values_RHLD.nbytes for layer in group.cache.slots))
        return logits_BV

    group._forward = watch
    run(group, intake, [make_request(text, max_tokens=150) for text in TEXTS * 2], limit=16)
    assert kv_bytes / 2 < max(taken) <= kv_bytes
    assert group.preemptions > 0


def test_a_choice_sent_back_does_not_begin_again_from_its_sibling(
    tiny_dir, make_request, adapters, reference
):
    """The youngest choice comes back while the other still runs: it must not copy that one's prompt."""
    group, intake = make_group(tiny_dir, kv_bytes=CONTEXT_LENGTH * KV_TOKEN_BYTES)
    # Three rows fit up to 170 tokens each; the first request ends at 180, so that two may go on to 240.
    start = len(intake.open(make_request("Hello")).prompt_ids)
    first = make_request("Hello", max_tokens=180 - start)
    pair = make_request("Hello", tuned=adapters[2], max_tokens=240 - start, n=2)
    joined = []
    begin = group.begin

    def watch(sequence):
        others = [other.completion for other in group.rows]
        joined.append((sequence.made_tokens > 0, sequence.completion in others))
        begin(sequence)

    group.begin = watch
    expected = reference(pair)
    assert run(group, intake, [first, pair]) == [reference(first), expected, expected]
    assert (True, True) in joined  # it did happen


def test_a_sequence_that_gets_no_row_gives_its_adapter_and_its_place_back(
    tiny_dir, make_request, adapters, monkeypatch
):
    group, intake = make_group(tiny_dir, adapter_bytes=1)
    opened = [intake.open(make_request(tuned=tuned, n=2, max_tokens=2)) for tuned in adapters[:2]]

    def no_memory(*_args, **_kwargs):
        raise torch.OutOfMemoryError

    with torch.inference_mode():
        group.queue.push(opened[0].sequences[0])
        start(group)
        group.queue.push(opened[0].sequences[1])
        second = admit(group)
        for layer in group.cache.slots:
            monkeypatch.setattr(layer, "copy_row", no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            group.begin(second)
        monkeypatch.undo()
        assert len(group.cache.lengths) == len(group.rows) == 1
        group.drop(opened[0])
        assert not group.cache.lengths
        group.queue.push(opened[1].sequences[0])
        assert admit(group) is opened[1].sequences[0]  # the only place for adapters is free


def test_adapters_leave_and_come_back_without_a_trace(tiny_dir, make_request, adapters, reference):
    requests = mixed_requests(make_request, adapters, 12)
    group, intake = make_group(tiny_dir, adapter_bytes=1)
    assert run(group, intake, requests) == [reference(request) for request in requests]
    assert len(group.adapters) == 1


def test_a_base_model_without_adapters_answers_as_plain_generate(tiny_dir, make_request, reference):
    requests = [make_request(text, max_tokens=20) for text in TEXTS]
    assert run(*make_group(tiny_dir), requests) == [reference(request) for request in requests]


def test_a_broken_neighbour_changes_nothing_for_the_others(tiny_dir, make_request, make_adapter, reference):
    """Its numbers must leave neither through the batch nor through the memory its row leaves behind."""
    broken = make_adapter("ft:broken", seed=9)
    weights = Path(broken.path) / "adapter_model.safetensors"
    save_file({key: torch.full_like(t, torch.nan) for key, t in load_file(weights).items()}, weights)
    write_manifest(Path(broken.path))
    group, intake = make_group(tiny_dir, max_batch=2)
    # The second is shorter than the first, so part of its reused row stays masked.
    first, second = make_request(TEXTS[1], max_tokens=40), make_request("Hello", max_tokens=20)
    with torch.inference_mode():
        opened = [
            intake.open(first),
            intake.open(make_request(TEXTS[1] * 2, tuned=broken)),
            intake.open(second),
        ]
        for completion in opened[:2]:
            group.queue.push(completion.sequences[0])
            start(group)
        assert opened[1].broken
        group.decode()
        group.drop(opened[1])
        group.queue.push(opened[2].sequences[0])
        start(group)
        while group.rows:
            group.decode()
            assert not any(completion.broken for completion in (opened[0], opened[2]))
    ids = [c.sequences[0].ids[len(c.prompt_ids) :] for c in (opened[0], opened[2])]
    assert ids == [reference(first), reference(second)]

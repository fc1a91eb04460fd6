"""One spec in, words out: their order and content, what is on disk, what stays behind in the warm base."""

from __future__ import annotations

import errno
import hashlib
import math
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file

from app.core.manifest import MANIFEST
from tests.tiny import write_examples
from tests.training.conftest import CPU, told
from worker.base_model import load_base_model, load_tokenizer
from worker.training import pulse
from worker.training.errors import failure_of
from worker.training.loop import train
from worker.training.model import WarmBase, tuned_model
from worker.training.record import RECORD
from worker.training.words import (
    TRAIN_WORD,
    Adapter,
    CheckpointReady,
    Failed,
    Finished,
    Section,
    Started,
    StepDone,
    TrainSpec,
    TrainWord,
    Working,
)

MakeSpec = Callable[..., TrainSpec]


def steps(words: list[TrainWord]) -> list[StepDone]:
    return [word for word in words if isinstance(word, StepDone)]


def checkpoints(words: list[TrainWord]) -> list[CheckpointReady]:
    return [word for word in words if isinstance(word, CheckpointReady)]


def digest(dir: str) -> dict[str, str]:
    beside = (MANIFEST, RECORD)
    paths = sorted(path for path in Path(dir).iterdir() if path.is_file() and path.name not in beside)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.mark.parametrize("adapter", list(Adapter))
def test_a_run_says_started_then_every_step_then_finished(
    make_spec: MakeSpec, warm: WarmBase, adapter: Adapter
) -> None:
    words = told(train(make_spec(adapter=adapter, dropout=0.1, learning_rate=3e-3), warm))
    assert isinstance(words[0], Started)
    assert isinstance(words[-1], Finished)
    assert [word.metrics.step for word in steps(words)] == [1, 2, 3, 4, 5, 6]  # 11 examples by 4, twice
    assert [word.epoch for word in steps(words)] == [1, 1, 1, 2, 2, 2]
    assert {word.total_steps for word in steps(words)} == {words[-1].steps} == {6}
    assert sum(word.tokens for word in steps(words)) == words[-1].trained_tokens
    assert [word.metrics.step for word in checkpoints(words)] == [3, 6]
    assert steps(words)[-1].metrics.train_loss < steps(words)[0].metrics.train_loss
    for word in words:
        assert TRAIN_WORD.validate_json(word.model_dump_json()) == word


@pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning"
)  # peft 0.21 on transformers 5.23
def test_training_teaches_the_answer(make_spec: MakeSpec, warm: WarmBase, tiny_dir: Path) -> None:
    words = list(train(make_spec(n_epochs=15, rank=16, learning_rate=2e-2), warm))
    assert steps(words)[-1].metrics.train_mean_token_accuracy == 1.0
    model = load_base_model(tiny_dir, quantize_4bit=True, device=CPU, dtype=torch.float32)
    tokenizer = load_tokenizer(tiny_dir)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Where is my order 12?"}],
        add_generation_prompt=True,
        return_tensors="pt",
    )
    tuned = PeftModel.from_pretrained(model, checkpoints(words)[-1].dir)
    out = tuned.generate(**prompt, do_sample=False, max_new_tokens=40)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(out) == "The answer is yes.<|im_end|>"


@pytest.mark.parametrize("adapter", list(Adapter))
def test_the_same_seed_writes_the_same_bytes_and_another_seed_does_not(
    make_spec: MakeSpec, warm: WarmBase, tmp_path: Path, adapter: Adapter
) -> None:
    spec = make_spec(adapter=adapter, dropout=0.1, seed=5)
    first = list(train(spec, warm))
    list(train(make_spec(adapter=Adapter.LORA, output_dir=str(tmp_path / "between")), warm))
    second = list(train(spec.model_copy(update={"output_dir": str(tmp_path / "again")}), warm))
    changed = {"output_dir": str(tmp_path / "other"), "seed": 6}
    third = list(train(spec.model_copy(update=changed), warm))
    digests = [digest(checkpoints(words)[-1].dir) for words in (first, second, third)]
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]
    assert [w.metrics for w in steps(first)] == [w.metrics for w in steps(second)]


@pytest.mark.parametrize("adapter", [Adapter.LORA, Adapter.QLORA])
def test_the_warm_base_is_the_same_object_with_the_same_weights_after_a_job(
    make_spec: MakeSpec, warm: WarmBase, tiny_dir: Path, adapter: Adapter
) -> None:
    four_bit = adapter is Adapter.QLORA
    base = warm.take(str(tiny_dir), quantize_4bit=four_bit)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    layers = str(base)
    list(train(make_spec(adapter=adapter), warm))
    assert warm.take(str(tiny_dir), quantize_4bit=four_bit) is base
    assert str(base) == layers
    after = base.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(weight.requires_grad for weight in base.parameters())


def test_full_training_never_touches_the_warm_base(make_spec: MakeSpec, warm: WarmBase) -> None:
    adapter_run = list(train(make_spec(adapter=Adapter.LORA), warm))
    list(train(make_spec(adapter=Adapter.FULL, output_dir=make_spec().output_dir + "-full"), warm))
    again = list(train(make_spec(adapter=Adapter.LORA, output_dir=make_spec().output_dir + "-2"), warm))
    assert [w.metrics for w in steps(again)] == [w.metrics for w in steps(adapter_run)]


def test_a_run_closed_in_the_middle_leaves_nothing_for_the_next_one(
    make_spec: MakeSpec, warm: WarmBase
) -> None:
    whole = list(train(make_spec(), warm))
    words = train(make_spec(output_dir=make_spec().output_dir + "-closed"), warm)
    while not isinstance(next(words), StepDone):
        pass
    words.close()
    again = list(train(make_spec(output_dir=make_spec().output_dir + "-again"), warm))
    assert [w.metrics for w in steps(again)] == [w.metrics for w in steps(whole)]


def test_an_adapter_checkpoint_is_a_peft_folder_without_pickles_or_paths_of_this_machine(
    make_spec: MakeSpec, warm: WarmBase, tiny_dir: Path
) -> None:
    dir = Path(checkpoints(list(train(make_spec(), warm)))[-1].dir)
    names = sorted(path.name for path in dir.iterdir())
    assert names == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
        "training_record.json",
        "training_state",
    ]
    assert str(tiny_dir) not in (dir / "adapter_config.json").read_text()
    tensors = load_file(dir / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 2  # layers, linear layers of a block, factors
    assert not any("lm_head" in name for name in tensors)


def test_chosen_target_modules_are_the_only_ones_trained(make_spec: MakeSpec, warm: WarmBase) -> None:
    words = list(train(make_spec(target_modules=("q_proj", "v_proj")), warm))
    tensors = load_file(Path(checkpoints(words)[-1].dir) / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in tensors} == {"q_proj", "v_proj"}


@pytest.mark.parametrize("wanted", [("foo",), ("self_attn",), ("q_proj", "foo"), ("lm_head",)])
def test_target_modules_the_model_lacks_fail_once_with_the_names_it_has(
    make_spec: MakeSpec, warm: WarmBase, wanted: tuple[str, ...]
) -> None:
    (failed,) = told(train(make_spec(target_modules=wanted), warm))
    assert isinstance(failed, Failed)
    assert (failed.code, failed.param) == ("invalid_value", "luthier.target_modules")
    assert not failed.retryable
    assert f": '{wanted[-1]}'. Its layers are q_proj, k_proj," in failed.message
    assert isinstance(list(train(make_spec(target_modules=("mlp.up_proj",)), warm))[-1], Finished)


def test_a_full_checkpoint_is_a_model_folder_with_the_catalogues_chat_template(
    make_spec: MakeSpec, warm: WarmBase, tiny_dir: Path
) -> None:
    template = load_tokenizer(tiny_dir).chat_template + "{# ours #}"
    words = list(train(make_spec(adapter=Adapter.FULL, chat_template=template), warm))
    dir = checkpoints(words)[-1].dir
    assert not [path.name for path in Path(dir).iterdir() if path.suffix in {".bin", ".pt"}]
    model = load_base_model(dir, quantize_4bit=False, device=CPU, dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert load_tokenizer(dir).chat_template == template


def test_a_run_goes_on_from_a_tuned_adapter(make_spec: MakeSpec, warm: WarmBase) -> None:
    first = list(train(make_spec(n_epochs=6), warm))
    start = checkpoints(first)[-1].dir
    second = list(
        train(make_spec(start_from_dir=start, output_dir=start + "-more", learning_rate=1e-4), warm)
    )
    assert steps(first)[0].metrics.train_mean_token_accuracy < 0.1
    assert steps(second)[0].metrics.train_mean_token_accuracy > 0.9


@pytest.mark.parametrize(("before", "now"), [(0.3, 0.0), (0.0, 0.3)])
def test_a_run_that_goes_on_has_its_own_dropout(
    make_spec: MakeSpec, warm: WarmBase, tmp_path: Path, before: float, now: float
) -> None:
    start = checkpoints(list(train(make_spec(n_epochs=1, dropout=before), warm)))[-1].dir
    spec = make_spec(start_from_dir=start, dropout=now, output_dir=str(tmp_path / "more"))
    with tuned_model(spec, warm) as tuned:
        rates = {m.p for m in tuned.model.modules() if isinstance(m, torch.nn.Dropout)}
        assert rates == ({now} if now else set())
        tuned.save(tmp_path)
    assert LoraConfig.from_pretrained(tmp_path).lora_dropout == now


def test_a_full_run_cannot_go_on_from_an_adapter(make_spec: MakeSpec, warm: WarmBase) -> None:
    start = checkpoints(list(train(make_spec(n_epochs=1), warm)))[-1].dir
    words = list(train(make_spec(adapter=Adapter.FULL, start_from_dir=start), warm))
    assert isinstance(words[-1], Failed)
    assert words[-1].code == "invalid_model"


def test_validation_is_sampled_during_an_epoch_and_full_at_its_end(
    make_spec: MakeSpec, warm: WarmBase, tmp_path: Path
) -> None:
    file = write_examples(tmp_path / "valid.jsonl", 20)
    words = list(train(make_spec(validation_file=str(file), batch_size=1, n_epochs=1), warm))
    metrics = [word.metrics for word in steps(words)]
    assert [m.step for m in metrics if m.valid_loss is not None] == [2, 4, 6, 8, 10, 11]
    assert [m.step for m in metrics if m.full_valid_loss is not None] == [11]
    assert checkpoints(words)[-1].metrics == metrics[-1]
    assert 0 <= metrics[-1].full_valid_mean_token_accuracy <= 1
    assert metrics[-1].full_valid_loss != metrics[-1].valid_loss


def test_measuring_validation_does_not_change_what_is_learned(
    make_spec: MakeSpec, warm: WarmBase, tmp_path: Path
) -> None:
    file = write_examples(tmp_path / "valid.jsonl", 3)
    without = list(train(make_spec(dropout=0.2), warm))
    spec = make_spec(dropout=0.2, validation_file=str(file), output_dir=str(tmp_path / "v"))
    with_file = list(train(spec, warm))
    assert digest(checkpoints(without)[-1].dir) == digest(checkpoints(with_file)[-1].dir)


def test_a_long_validation_gives_signs_of_life(
    make_spec: MakeSpec, warm: WarmBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulse, "EVERY_S", 0.0)
    file = write_examples(tmp_path / "valid.jsonl", 20)
    words = list(train(make_spec(validation_file=str(file), n_epochs=1), warm))
    sections = Counter(word.section for word in words if isinstance(word, Working))
    assert sections[Section.SETUP] == 1 + 11 + 20  # its beginning, and each example of both files
    assert sections[Section.VALIDATION] == (1 + 1 + 1) + 3 * (1 + 1) + 1  # samples of 16 in a pass, the rest


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_fails_with_the_cure_and_may_be_tried_again(
    make_spec: MakeSpec, warm: WarmBase, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        failed = list(train(make_spec(n_epochs=1), warm))[-1]
    assert isinstance(failed, Failed)
    assert (failed.code, failed.retryable) == ("storage_full", True)
    assert "Delete models" in failed.message
    assert isinstance(list(train(make_spec(n_epochs=1), warm))[-1], Finished)


def test_a_full_disk_is_known_in_the_words_of_safetensors_and_other_errors_are_not() -> None:
    text = "Error while serializing: I/O error: {} (os error {})"
    full = failure_of(SafetensorError(text.format("No space left on device", errno.ENOSPC)))
    assert full is not None
    assert full.code == "storage_full"
    assert failure_of(SafetensorError(text.format("Input/output error", errno.EIO))) is None
    assert failure_of(OSError(errno.EIO, "Input/output error")) is None


def test_checkpoints_come_at_the_interval_and_at_the_end_of_each_epoch(
    make_spec: MakeSpec, warm: WarmBase
) -> None:
    words = list(train(make_spec(checkpoint_interval=2), warm))
    assert [word.metrics.step for word in checkpoints(words)] == [2, 3, 4, 6]


@pytest.mark.parametrize("adapter", [Adapter.LORA, Adapter.FULL])
def test_a_diverging_run_fails_with_the_cure_and_is_not_tried_again(
    make_spec: MakeSpec, warm: WarmBase, adapter: Adapter
) -> None:
    words = list(train(make_spec(adapter=adapter, learning_rate=1e30, n_epochs=5), warm))
    failed = words[-1]
    assert isinstance(failed, Failed)
    assert (failed.code, failed.retryable) == ("non_finite_loss", False)
    assert "learning_rate_multiplier" in failed.message
    for word in steps(words):
        assert math.isfinite(word.metrics.train_loss)


def test_a_file_without_trainable_tokens_fails_before_the_model_is_touched(
    make_spec: MakeSpec, warm: WarmBase
) -> None:
    (failed,) = told(train(make_spec(max_length=3), warm))
    assert isinstance(failed, Failed)
    assert failed.code == "no_trainable_tokens"


@pytest.mark.parametrize("adapter", list(Adapter))
def test_training_in_bfloat16_follows_training_in_float32_and_saves_float32(
    make_spec: MakeSpec, warm: WarmBase, tmp_path: Path, adapter: Adapter
) -> None:
    exact = steps(list(train(make_spec(adapter=adapter), warm)))
    spec = make_spec(adapter=adapter, output_dir=str(tmp_path / "rounded"))
    words = list(train(spec, WarmBase(CPU, torch.bfloat16)))
    for one, other in zip(steps(words), exact, strict=True):
        assert one.metrics.train_loss == pytest.approx(other.metrics.train_loss, rel=0.05)
    (weights,) = Path(checkpoints(words)[-1].dir).glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.float32}

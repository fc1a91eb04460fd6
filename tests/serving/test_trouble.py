"""Trouble inside the engine: whom it hits, what they are told, and that the others go on."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from app.core.completions import TunedWeights, WeightsKind
from app.core.manifest import MANIFEST, write_manifest
from tests.serving.listener import until

WEIGHTS = "adapter_model.safetensors"


def copy(tuned: TunedWeights, target: Path, id: str) -> TunedWeights:
    shutil.copytree(tuned.path, target)
    return TunedWeights(id=id, kind=tuned.kind, path=str(target))


def rewrite(tuned: TunedWeights, change) -> None:
    """Weights that are whole, but not what they should be."""
    path = Path(tuned.path) / WEIGHTS
    save_file(change(load_file(path)), path)
    write_manifest(Path(tuned.path))


def flip(tuned: TunedWeights, name: str) -> None:
    """One bit of a file is not what it was."""
    path = Path(tuned.path) / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def break_next_step(engine, times: int = 1):
    """The model itself fails, as a device would; a hook on a torch module stands for the device."""
    left = times

    def fail(*_args) -> None:
        nonlocal left
        if left:
            left -= 1
            raise RuntimeError("device-side assert")

    engine._loop.models.base.model.model.norm.register_forward_pre_hook(fail)


def break_decoding(engine) -> None:
    """Every step after a prompt fails, as on a device that has gone."""

    def fail(_module, args) -> None:
        if args[0].shape[1] == 1:
            raise RuntimeError("device-side assert")

    engine._loop.models.base.model.model.norm.register_forward_pre_hook(fail)


DAMAGES = {
    "no folder": lambda tuned: shutil.rmtree(tuned.path),
    "no weights": lambda tuned: (Path(tuned.path) / WEIGHTS).unlink(),
    "cut file": lambda tuned: (Path(tuned.path) / WEIGHTS).write_bytes(
        (Path(tuned.path) / WEIGHTS).read_bytes()[:99]
    ),
    "no configuration": lambda tuned: (Path(tuned.path) / "adapter_config.json").unlink(),
    "a bit of the weights": lambda tuned: flip(tuned, WEIGHTS),
    "a bit of the configuration": lambda tuned: flip(tuned, "adapter_config.json"),
    "a bit of the manifest": lambda tuned: flip(tuned, MANIFEST),
    "no manifest": lambda tuned: (Path(tuned.path) / MANIFEST).unlink(),
    "wrong shapes": lambda tuned: rewrite(
        tuned, lambda ts: {k: t[:, :1].contiguous() for k, t in ts.items()}
    ),
    "a tensor missing": lambda tuned: rewrite(tuned, lambda ts: dict(list(ts.items())[1:])),
    "a tensor too many": lambda tuned: rewrite(
        tuned, lambda ts: ts | {"base_model.model.lm_head.x": torch.ones(1)}
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_adapter_is_unavailable_and_harms_nobody(
    make_engine, make_request, ask, adapters, tmp_path, damage
):
    engine = make_engine()
    expected = ask(engine, make_request("Hello", tuned=adapters[0], max_tokens=20)).wait().text()
    base = ask(engine, make_request("Hello", max_tokens=20)).wait().text()
    bad = copy(adapters[2], tmp_path / "bad", "ft:bad")
    DAMAGES[damage](bad)
    for _ in range(2):
        failed = ask(engine, make_request("Hello", tuned=bad)).wait().failed
        assert (failed.status, failed.code) == (503, "model_unavailable")
        assert str(tmp_path) not in failed.message
    assert ask(engine, make_request("Hello", tuned=adapters[0], max_tokens=20)).wait().text() == expected
    assert ask(engine, make_request("Hello", max_tokens=20)).wait().text() == base
    assert engine.stats().adapters == 1


def test_a_damaged_first_adapter_leaves_the_base_as_it_was(
    make_engine, make_request, ask, adapters, tmp_path
):
    engine = make_engine()
    base = ask(engine, make_request("Hello", max_tokens=20)).wait().text()
    bad = copy(adapters[2], tmp_path / "bad", "ft:bad")
    DAMAGES["wrong shapes"](bad)
    assert ask(engine, make_request("Hello", tuned=bad)).wait().failed
    assert ask(engine, make_request("Hello", max_tokens=20)).wait().text() == base
    assert ask(engine, make_request("Hello", tuned=adapters[1], max_tokens=20)).wait().finished


@pytest.mark.parametrize("config", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_adapters_that_cannot_share_a_batch_are_refused(make_engine, make_request, ask, make_adapter, config):
    special = make_adapter("ft:special", **config)
    assert ask(make_engine(), make_request(tuned=special)).wait().failed.code == "model_unavailable"


def test_pickled_weights_are_never_read(make_engine, make_request, ask, adapters, tmp_path):
    pickled = copy(adapters[0], tmp_path / "pickled", "ft:pickled")
    torch.save(load_file(Path(pickled.path) / WEIGHTS), Path(pickled.path) / "adapter_model.bin")
    (Path(pickled.path) / WEIGHTS).unlink()
    write_manifest(Path(pickled.path))
    assert ask(make_engine(), make_request(tuned=pickled)).wait().failed.code == "model_unavailable"


def test_weights_that_are_not_numbers_end_their_own_request_only(
    make_engine, make_request, ask, adapters, tmp_path
):
    engine = make_engine()
    bad = copy(adapters[0], tmp_path / "bad", "ft:nan")
    rewrite(bad, lambda ts: {key: torch.full_like(tensor, torch.nan) for key, tensor in ts.items()})
    neighbour = ask(engine, make_request("Hello", max_tokens=60))
    failed = ask(engine, make_request(tuned=bad)).wait().failed
    assert (failed.status, failed.code) == (503, "engine_error")
    assert neighbour.wait().finished


def test_a_failing_step_ends_the_running_requests_and_the_engine_goes_on(make_engine, make_request, ask):
    engine = make_engine()
    running = [ask(engine, make_request()) for _ in range(3)]
    for listener in running:
        assert listener.first.wait(10)
    break_next_step(engine)
    for listener in running:
        assert (listener.wait().failed.status, listener.failed.code) == (503, "engine_error")
    assert engine.alive
    assert ask(engine, make_request(max_tokens=5)).wait().finished[0].completion_tokens == 5
    assert engine.stats().errors == 1


def test_an_engine_that_keeps_failing_is_dead_and_says_so(make_engine, make_request, ask):
    engine = make_engine()
    break_decoding(engine)
    for _ in range(3):
        assert ask(engine, make_request()).wait().failed.code == "engine_error"
    engine._thread.join(10)
    assert not engine.alive
    assert not engine.stats().alive
    assert ask(engine, make_request()).wait().failed.code == "engine_error"


def test_an_engine_on_a_device_that_fails_every_prompt_is_dead_too(make_engine, make_request, ask):
    engine = make_engine()
    break_next_step(engine, times=3)
    for _ in range(3):
        assert ask(engine, make_request()).wait().failed.code == "engine_error"
    engine._thread.join(10)
    assert not engine.alive


def test_a_whole_model_answers_beside_the_base_and_leaves_for_another(
    make_engine, make_request, ask, tmp_path
):
    from tests.tiny import build_tiny_model

    folders = [build_tiny_model(tmp_path / str(seed), seed=seed) for seed in (5, 6)]
    for folder in folders:
        write_manifest(folder)
    first, second = (
        TunedWeights(id=f"ft:full:{folder.name}", kind=WeightsKind.FULL, path=str(folder))
        for folder in folders
    )
    engine = make_engine(max_full_models=1)
    sampling = {"temperature": 1.0, "seed": 1, "max_tokens": 20}
    listeners = [ask(engine, make_request(tuned=tuned, **sampling)) for tuned in (None, first, second, first)]
    texts = [listener.wait().text() for listener in listeners]
    assert texts[1] == texts[3]
    assert len(set(texts)) == 3
    assert engine.stats().full_models == 1


@pytest.mark.parametrize("fails", [False, True], ids=["read", "unreadable"])
def test_a_whole_model_nobody_waits_for_any_more_leaves_its_place(
    make_engine, make_request, ask, tmp_path, tiny_dir, fails
):
    """Its request goes while it is being read; the only place must not stay taken."""
    left_dir = tmp_path / "left"
    shutil.copytree(tiny_dir, left_dir)
    if fails:
        (left_dir / "model.safetensors").write_bytes(b"x")
    left, wanted = (
        TunedWeights(id=f"ft:{folder.name}", kind=WeightsKind.FULL, path=str(folder))
        for folder in (left_dir, tiny_dir)
    )
    engine = make_engine(max_full_models=1)
    may_read, models = threading.Event(), engine._loop.models
    models._reader.submit(may_read.wait, 20)  # the disk is slow
    ask(engine, make_request(id="gone", tuned=left))
    until(lambda: models._loading)
    engine.cancel("gone")
    until(lambda: engine.stats().loading == 0)
    may_read.set()
    assert ask(engine, make_request(tuned=wanted, max_tokens=3)).wait().finished


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", MANIFEST])
def test_a_whole_model_with_one_bit_changed_is_never_served(
    make_engine, make_request, ask, tmp_path, tiny_dir, name
):
    shutil.copytree(tiny_dir, tmp_path / "whole")
    whole = TunedWeights(id="ft:whole", kind=WeightsKind.FULL, path=str(tmp_path / "whole"))
    flip(whole, name)
    engine = make_engine()
    assert ask(engine, make_request(tuned=whole)).wait().failed.code == "model_unavailable"
    assert ask(engine, make_request(max_tokens=2)).wait().finished


def test_all_who_wait_for_an_unreadable_model_hear_of_it(make_engine, make_request, ask, tmp_path):
    engine = make_engine(max_full_models=1)
    may_read = threading.Event()
    engine._loop.models._reader.submit(may_read.wait, 20)
    gone = TunedWeights(id="ft:gone", kind=WeightsKind.FULL, path=str(tmp_path / "gone"))
    listeners = [ask(engine, make_request(tuned=gone)) for _ in range(3)]
    until(lambda: engine.stats().loading == 3)
    may_read.set()
    assert [listener.wait().failed.code for listener in listeners] == ["model_unavailable"] * 3


def test_a_whole_model_that_is_not_there_is_unavailable(make_engine, make_request, ask, tmp_path):
    engine = make_engine()
    gone = TunedWeights(id="ft:gone", kind=WeightsKind.FULL, path=str(tmp_path / "gone"))
    assert ask(engine, make_request(tuned=gone)).wait().failed.code == "model_unavailable"
    assert ask(engine, make_request(max_tokens=2)).wait().finished


def test_weights_can_be_loaded_ahead_of_their_first_request(make_engine, adapters, tiny_dir, tmp_path):
    from worker.serving.adapter_files import ModelUnavailable

    engine = make_engine(adapter_bytes=1)
    engine.load_adapter(adapters[0]).result(10)
    engine.load_adapter(adapters[1]).result(10)
    whole = TunedWeights(id="ft:full", kind=WeightsKind.FULL, path=str(tiny_dir))
    engine.load_adapter(whole).result(10)
    with pytest.raises(ModelUnavailable):
        engine.load_adapter(TunedWeights(id="x", kind=WeightsKind.LORA, path=str(tmp_path))).result(10)
    engine.stop()
    with pytest.raises(ModelUnavailable):
        engine.load_adapter(adapters[0]).result(10)

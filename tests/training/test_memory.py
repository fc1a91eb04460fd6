"""The predicted memory of a job against what torch really keeps and really trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from app.core.memory import (
    USABLE,
    Device,
    Method,
    Pass,
    Row,
    Workload,
    activation_bytes,
    adapter_parameters,
    label_bytes,
    largest_pass,
)
from app.core.shapes import Shape, read_shape
from worker.chat_template import TokenizedExample
from worker.training.model import TunedModel, WarmBase, tuned_model
from worker.training.rows import rows_of
from worker.training.words import Adapter, TrainSpec

MakeSpec = Callable[..., TrainSpec]
CPU = Device("cpu")


@pytest.fixture(scope="module")
def shape(tiny_dir: Path) -> Shape:
    found = read_shape(tiny_dir)
    assert found is not None
    return found


def example(ids: list[int], labels: int = 4) -> TokenizedExample:
    return TokenizedExample(ids, [False] * (len(ids) - labels) + [True] * labels)


def alone() -> list[TokenizedExample]:
    """100 tokens that are computed, and one that is only predicted."""
    return [example([20 + at % 70 for at in range(101)])]


def alike() -> list[TokenizedExample]:
    return [example([9 + at for at in range(100)] + [150 + row] + [20 + row] * 30) for row in range(8)]


def kept_bytes(tuned: TunedModel, examples: list[TokenizedExample]) -> int:
    """What autograd holds after a forward pass, each storage once, the model's own tensors apart."""
    own = {tensor.untyped_storage().data_ptr() for tensor in tuned.model.state_dict().values()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        tuned.sums(examples)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("rows", [alone, alike])
@pytest.mark.parametrize(
    "options",
    [{"adapter": "lora"}, {"adapter": "qlora"}, {"adapter": "full"}, {"adapter": "lora", "dropout": 0.1}],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_what_a_pass_keeps_is_what_was_predicted(
    make_spec: MakeSpec,
    warm: WarmBase,
    shape: Shape,
    options: dict[str, Any],
    rows: Callable[[], list[TokenizedExample]],
) -> None:
    """To 2 %: scalars and a mask's bit more or less are left out."""
    spec = make_spec(**options)
    with tuned_model(spec, warm) as tuned:
        tuned.model.train()
        kept = kept_bytes(tuned, rows())
    shares = spec.dropout == 0.0
    one = Pass()
    for row in rows_of([(e.ids[:-1], sum(e.is_label)) for e in rows()], shares=shares):
        one = one.plus(row)
    method = Method(str(spec.adapter), rank=spec.rank, dropout=spec.dropout)
    # Of what a label takes, its log-probabilities are there already.
    predicted = activation_bytes(shape, method, device=CPU, one=one) + one.labels * label_bytes(shape) // 3
    assert predicted == pytest.approx(kept, rel=0.02)


@pytest.mark.parametrize("modules", [(), ("q_proj", "down_proj")])
@pytest.mark.parametrize("adapter", list(Adapter))
def test_as_many_weights_are_trained_as_predicted(
    make_spec: MakeSpec, warm: WarmBase, shape: Shape, adapter: Adapter, modules: tuple[str, ...]
) -> None:
    with tuned_model(make_spec(adapter=adapter, target_modules=modules), warm) as tuned:
        trained = sum(weight.numel() for weight in tuned.parameters)
    method = Method(str(adapter), rank=4, target_modules=modules)
    predicted = shape.parameters if adapter is Adapter.FULL else adapter_parameters(shape, method)
    assert predicted == trained


def test_nf4_weights_take_as_much_as_predicted(tiny_dir: Path, warm: WarmBase, shape: Shape) -> None:
    model = warm.take(str(tiny_dir), quantize_4bit=True)
    tables = ("quant_map", "quant_state")  # the same few hundred bytes for a layer of any size
    taken = sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in model.state_dict().items()
        if not any(table in name for table in tables) and not name.startswith("lm_head")  # tied
    )
    work = Workload(shape, Method("qlora", rank=4), (Row(100, 100, 4),), 1, 0)
    unpacked = max(linear.inputs * linear.outputs for linear in shape.linears) * 4
    assert work.footprint(CPU, most_tokens=1).weights - unpacked == pytest.approx(taken, rel=0.01)


def test_a_pass_holds_as_many_rows_as_its_tokens_and_its_batch_allow(shape: Shape) -> None:
    rows = (*(Row(100, 100, 10) for _ in range(30)), Row(400, 400, 10))
    work = Workload(shape, Method("lora", rank=4), rows, 8, 0)
    assert largest_pass(work, device=CPU, most_tokens=1).tokens == 400  # a row is never split
    assert largest_pass(work, device=CPU, most_tokens=650).tokens == 600
    assert largest_pass(work, device=CPU, most_tokens=10_000).tokens == 400 + 7 * 100


def test_a_pass_is_cut_to_what_a_small_device_holds_and_no_further_than_one_row(shape: Shape) -> None:
    work = Workload(shape, Method("lora", rank=4), (Row(400, 400, 100),) * 64, 64, 0)
    roomy = work.tokens_a_pass(Device("cpu", memory_bytes=64 * 10**9))
    assert roomy == work.tokens_a_pass(CPU) == 3072
    room = work.footprint(CPU, most_tokens=1000).total / USABLE["cpu"]
    tight = Device("cpu", memory_bytes=int(room))
    assert 400 <= work.tokens_a_pass(tight) <= 1000
    assert work.peak_bytes(tight) <= USABLE["cpu"] * room + 1
    assert work.fits(tight)
    assert not work.fits(Device("cpu", memory_bytes=work.least_bytes(CPU) - 1))
    assert work.cut(200).least_bytes(CPU) < work.least_bytes(CPU)

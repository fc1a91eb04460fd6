"""Packed layers compute what plain ones do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.serving.conftest import CPU
from worker.base_model import load_base_model
from worker.serving.linears import PackedLinear, pack_linears


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(64, 48)


@pytest.mark.parametrize("shape", [(1, 1, 64), (32, 1, 64), (1, 130, 64), (7, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_layer_is_the_same_layer(linear, shape, dtype):
    x = torch.randn(shape, dtype=dtype)
    linear = linear.to(dtype)
    torch.testing.assert_close(PackedLinear(linear)(x), linear(x))


def test_all_layers_of_a_model_are_packed_and_tied_embeddings_stay(tiny_dir):
    plain, packed = (
        load_base_model(tiny_dir, quantize_4bit=False, device=CPU, dtype=torch.float32) for _ in range(2)
    )
    pack_linears(packed)
    assert not any(type(module) is nn.Linear for module in packed.modules())
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(packed(input_ids=ids).logits, plain(input_ids=ids).logits)

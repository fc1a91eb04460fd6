"""LoRA layers without waste: one autograd function for the layers that read one input.

y = x Wᵀ + s (x Aᵀ) Bᵀ (Hu et al. 2021, "LoRA", section 4.1). peft's own path makes three tensors of the
size of y on the way and autograd two more of the size of x; here the low-rank part is added in place by the
product itself, both ways. peft's modules stay where they are, so saving and loading are peft's.
Knows layers, not models: layers are taken together by their names and by reading the very same tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

# Names under which transformers' models give one input to several layers.
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_ADAPTER = "default"


class _Layer:
    """One LoRA layer's tensors: frozen (O, I) weight in whatever form, factors (R, I) and (O, R)."""

    def __init__(self, layer: Any) -> None:
        self.base: Any = layer.get_base_layer()
        self.down: Tensor = layer.lora_A[_ADAPTER].weight
        self.up: Tensor = layer.lora_B[_ADAPTER].weight
        self.scale: float = layer.scaling[_ADAPTER]

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The frozen weight (O, I), dequantised where it is NF4; that copy lives as long as its product."""
        stored: Any = self.base.weight
        state = getattr(stored, "quant_state", None)
        if state is None:
            return cast(Tensor, stored.to(dtype))
        from bitsandbytes.functional import dequantize_4bit

        full: Tensor = dequantize_4bit(stored, state)
        return full.to(dtype)


class _LoraProducts(torch.autograd.Function):
    """Outputs (T, O_i) of layers that share an input (T, I); `factors` is A_1, B_1, A_2, B_2, …"""

    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, layers: tuple[_Layer, ...], dtype: torch.dtype, *factors: Tensor
    ) -> tuple[Tensor, ...]:
        x = x_TI.to(dtype)
        lows, outputs = [], []
        for at, layer in enumerate(layers):
            down, up = (factor.to(dtype) for factor in factors[2 * at : 2 * at + 2])
            low_TR = x @ down.T
            weight, bias = layer.weight(dtype), layer.base.bias
            y_TO = x @ weight.T if bias is None else torch.addmm(bias.to(dtype), x, weight.T)
            outputs.append(y_TO.addmm_(low_TR, up.T, alpha=layer.scale))
            lows.append(low_TR)
        ctx.save_for_backward(x, *factors, *lows)
        ctx.layers, ctx.dtype, ctx.x_dtype = layers, dtype, x_TI.dtype
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        layers: tuple[_Layer, ...] = ctx.layers
        x, *rest = ctx.saved_tensors
        factors, lows = rest[: 2 * len(layers)], rest[2 * len(layers) :]
        x_grad: Tensor | None = None
        factor_grads: list[Tensor | None] = []
        for at, (layer, gradient) in enumerate(zip(layers, gradients, strict=True)):
            if gradient is None:
                factor_grads += [None, None]
                continue
            g_TO = gradient.to(ctx.dtype)
            down, up = factors[2 * at], factors[2 * at + 1]
            low_grad_TR = (g_TO @ up.to(ctx.dtype)).mul_(layer.scale)
            factor_grads.append((low_grad_TR.T @ x).to(down.dtype))
            factor_grads.append((g_TO.T @ lows[at]).mul_(layer.scale).to(up.dtype))
            if ctx.needs_input_grad[0]:
                weight = layer.weight(ctx.dtype)
                x_grad = g_TO @ weight if x_grad is None else x_grad.addmm_(g_TO, weight)
                x_grad.addmm_(low_grad_TR, down.to(ctx.dtype))
        return None if x_grad is None else x_grad.to(ctx.x_dtype), None, None, *factor_grads


class _Siblings:
    """Layers that read the same input: the first one asked computes all, the others take what is theirs."""

    def __init__(self, layers: list[Any]) -> None:
        self._layers = tuple(_Layer(layer) for layer in layers)
        self._input: Tensor | None = None
        self._waiting: dict[int, Tensor] = {}

    def output(self, number: int, x: Tensor) -> Tensor:
        """What layer `number` makes of `x` (..., I)."""
        if self._input is not x or number not in self._waiting:
            self._input, self._waiting = x, dict(enumerate(_products(x, self._layers)))
        output = self._waiting.pop(number)
        if not self._waiting:
            self._input = None
        return output


def _products(x: Tensor, layers: tuple[_Layer, ...]) -> list[Tensor]:
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    factors = [factor for layer in layers for factor in (layer.down, layer.up)]
    flat = x.reshape(-1, x.shape[-1])
    apply = cast("Callable[..., tuple[Tensor, ...]]", _LoraProducts.apply)
    outputs = apply(flat, layers, dtype, *factors)
    return [output.view(*x.shape[:-1], -1) for output in outputs]


def speed_up(model: nn.Module) -> int:
    """Give every plain LoRA layer of `model` the products above; returns how many layers.

    Layers with dropout, a variant (DoRA), an adapter of another name or more than one stay as they are.
    """
    changed = 0
    for parent in model.modules():
        named = {name: child for name, child in parent.named_children() if _is_plain(child)}
        for group in _grouped(named):
            siblings = _Siblings([named[name] for name in group])
            for number, name in enumerate(group):
                # Not a subclass or another module: peft finds, saves and unloads its own.
                vars(named[name])["forward"] = _Forward(siblings, number)
                changed += 1
    return changed


class _Forward:
    """The forward of one layer."""

    def __init__(self, siblings: _Siblings, number: int) -> None:
        self._siblings, self._number = siblings, number

    def __call__(self, x: Tensor) -> Tensor:
        return self._siblings.output(self._number, x)


def _grouped(named: dict[str, nn.Module]) -> Iterable[tuple[str, ...]]:
    left = dict(named)
    for group in _SIBLINGS:
        present = tuple(name for name in group if name in left)
        if present:
            yield present
        for name in present:
            del left[name]
    yield from ((name,) for name in left)


def _is_plain(module: nn.Module) -> bool:
    layer: Any = module
    return (
        (isinstance(module, LoraLinear) or _is_4bit(module))
        and list(layer.lora_A) == [_ADAPTER]
        and layer.active_adapters == [_ADAPTER]
        and not layer.merged
        and not layer.disable_adapters
        and not layer.lora_variant
        and not layer.lora_bias[_ADAPTER]
        and not layer.fan_in_fan_out
        and isinstance(layer.lora_dropout[_ADAPTER], nn.Identity)
        and isinstance(layer.get_base_layer(), nn.Linear)
    )


def _is_4bit(module: nn.Module) -> bool:
    return type(module).__name__ == "Linear4bit" and type(module).__module__ == "peft.tuners.lora.bnb"

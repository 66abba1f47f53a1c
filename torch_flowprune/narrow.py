"""Convolutions of a float64 network in float32, in which alone a CPU has fast ones: powers of two keep them in its range."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import frexp
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

from torch_flowprune.twice import Bilinear, Found, convolution_of


@contextmanager
def narrow_convolutions() -> Iterator[None]:
    """Inside, convolutions of float64 tensors on a CPU, and their gradients, are computed in float32.

    Every operand is divided by the power of two above its largest value, and the result multiplied by these powers in float64: it is linear in
    each operand, so nothing is lost but digits. What is under 1e-38 of the largest value of its tensor becomes 0. The gradient
    cannot be differentiated again.
    """
    with _Narrow():
        yield


class _Narrow(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = convolution_of(func, args, kwargs or {})
        if found is None or found[1].dtype is not torch.float64 or found[1].device.type != "cpu":
            return func(*args, **(kwargs or {}))
        return _Convolution.apply(*found)


class _Convolution(Function):
    """``x * w + b`` in float64, computed in float32."""

    @staticmethod
    def forward(ctx: Any, operator: Bilinear, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        (x, by_x), (w, by_w) = _divided(x), _divided(w)
        ctx.operator, ctx.by_x, ctx.by_w = operator, by_x, by_w
        ctx.save_for_backward(x, w)
        found = _times(operator.product(x, w, None), by_x * by_w)
        return found if b is None else found.add_(b.view(-1, *(1,) * (x.dim() - 2)))  # here, for it may be far larger than the rest

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, w = ctx.saved_tensors
        dy, by_y = _divided(dy)
        wanted = ctx.needs_input_grad[1:]
        found: Found = ctx.operator.transposes(dy, x, w, wanted)
        powers = by_y * ctx.by_w, by_y * ctx.by_x, by_y
        return None, *(_times(value, power) if want and value is not None else None for value, power, want in zip(found, powers, wanted, strict=True))


def _divided(x: Tensor) -> tuple[Tensor, float]:
    """The tensor over the power of two above its largest value, in float32; and that power."""
    if not x.numel():
        return x.float(), 1.0
    low, high = x.aminmax()
    _, exponent = frexp(max(-low.item(), high.item()))
    power = 2.0 ** max(-1000, min(1000, exponent))
    return (x * (1 / power)).float(), power


def _times(x: Tensor, power: float) -> Tensor:
    """In float64."""
    return x * torch.tensor([power], dtype=torch.float64)

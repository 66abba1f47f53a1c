"""Operators linear in activation and weight, with derivatives: linear layers, convolutions, batch norms in eval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from torch_flowprune.torch_internals import (
    NO_TORCH_FUNCTION,
    batch_norm_backward,
    convolution_backward,
    in_function_transform,
    unsafe_view,
)

BilinearCall: TypeAlias = "tuple[Bilinear, Tensor, Tensor, Tensor | None]"
"""An operator and its operands."""
AsCall: TypeAlias = "Callable[..., BilinearCall | None]"
"""From the arguments of a function of torch, where they are what an operator is for."""
Wanted: TypeAlias = "tuple[bool, bool, bool]"
Gradients: TypeAlias = "tuple[Tensor | None, Tensor | None, Tensor | None]"
"""Those of x, w and b."""

_aten = torch.ops.aten


@dataclass(frozen=True)
class Bilinear:
    """An operator ``y = x * w + b``, linear in w and affine in x, with the derivative that torch has for it.

    Attributes:
        product: ``(x, w, b) -> y``.
        transposes: ``(dy, x, w, wanted) -> dx, dw, db``; what is not wanted is None or anything.
        linear: the same operator without the constant, where it has one in x.
        columns: of a convolution along two axes in one group, ``x -> (sample, position, weights of an output)``.
    """

    product: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    transposes: Callable[[Tensor, Tensor, Tensor, Wanted], Gradients]
    linear: Bilinear | None = None
    columns: Callable[[Tensor], Tensor] | None = None


def convolution_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BilinearCall | None:
    """The call of a convolution as the operator and its operands; None for any other call."""
    call = _CONVOLUTION_CALLS.get(func)
    return call(*args, **kwargs) if call else None


def _linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None
) -> BilinearCall | None:
    if out is not None or not (is_plain(input, weight, bias) and input.dim() >= 2 == weight.dim()):
        return None
    return Bilinear(_linear_product, _linear_transposes), input, weight, bias


def _linear_product(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """Not as a view of the product of all rows, as older versions of torch give it.

    Autograd would refuse to have it written in place.
    """
    product = _aten.linear(x, w, b)
    return unsafe_view(product, product.shape)  # type: ignore[no-any-return]


def _linear_transposes(dy: Tensor, x: Tensor, w: Tensor, wanted: Wanted) -> Gradients:
    rows = dy.flatten(0, -2)
    return (
        dy @ w if wanted[0] else None,
        rows.T @ x.flatten(0, -2) if wanted[1] else None,
        rows.sum(0) if wanted[2] else None,
    )


def _convolution(
    axes: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sizes: Sequence[Any],
    *,
    transposed: bool,
    groups: int,
) -> BilinearCall | None:
    """``sizes`` are stride, padding, dilation and output padding: numbers or tuples of them.

    A padding in words stays torch's.
    """
    if not is_plain(input, weight, bias) or input.dim() != axes + 2 or any(isinstance(size, str) for size in sizes):
        return None
    stride, padding, dilation, more = ([size] * axes if isinstance(size, int) else list(size) for size in sizes)
    options = stride, padding, dilation, transposed, more, groups

    def product(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return _aten.convolution(x, w, b, *options)  # type: ignore[no-any-return]

    def transposes(dy: Tensor, x: Tensor, w: Tensor, wanted: Wanted) -> Gradients:
        return convolution_backward(dy, x, w, [dy.shape[1]], *options, wanted)  # type: ignore[no-any-return]

    def columns(x: Tensor) -> Tensor:
        if not any(padding) and set(weight.shape[2:]) == {1}:
            return x[:, :, :: stride[0], :: stride[1]].flatten(2).transpose(1, 2)
        return functional.unfold(x, weight.shape[2:], dilation, padding, stride).transpose(1, 2)  # type: ignore[arg-type]

    unfolded = columns if axes == 2 and groups == 1 and not transposed else None
    return Bilinear(product, transposes, columns=unfolded), input, weight, bias


def _forward(axes: int) -> AsCall:
    def convolution(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> BilinearCall | None:
        return _convolution(axes, input, weight, bias, (stride, padding, dilation, 0), transposed=False, groups=groups)

    return convolution


def _transposed(axes: int) -> AsCall:
    def convolution(
        input: Tensor, weight: Tensor, bias: Tensor | None = None,
        stride: Any = 1, padding: Any = 0, output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
    ) -> BilinearCall | None:  # fmt: skip
        return _convolution(
            axes, input, weight, bias, (stride, padding, dilation, output_padding), transposed=True, groups=groups
        )

    return convolution


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> BilinearCall | None:
    """In eval mode: every channel shifted and scaled by constants, then ``* w + b``."""
    if (
        training
        or running_mean is None
        or running_var is None
        or not is_plain(input, running_mean, running_var, weight, bias)
    ):
        return None
    w = torch.ones_like(running_mean) if weight is None else weight
    whole = _normalized(
        running_mean, running_var, eps, linear=_normalized(torch.zeros_like(running_mean), running_var, eps)
    )
    return whole, input, w, bias


def _normalized(mean: Tensor, var: Tensor, eps: float, linear: Bilinear | None = None) -> Bilinear:
    def product(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return _aten.native_batch_norm(x, w, b, mean, var, False, 0.0, eps)[0]  # type: ignore[no-any-return]

    def transposes(dy: Tensor, x: Tensor, w: Tensor, wanted: Wanted) -> Gradients:
        if len(x) == 1:  # in two layouts torch's own is wrong (see one_sample_norms)
            dy, x = dy.contiguous(), x.contiguous()
        return batch_norm_backward(dy, x, w, mean, var, None, None, False, eps, wanted)  # type: ignore[no-any-return]

    return Bilinear(product, transposes, linear)


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether these are what the operators above are for.

    Real, dense, all of one type, outside of autocast and functional transforms.
    """
    operands = [tensor for tensor in tensors if tensor is not None]
    return (
        all(is_ordinary(tensor) and tensor.layout is torch.strided for tensor in operands)
        and operands[0].is_floating_point()
        and len({tensor.dtype for tensor in operands}) == 1
        and not torch.is_autocast_enabled(operands[0].device.type)
        and not in_function_transform()
    )


def is_ordinary(tensor: Tensor) -> bool:
    """Of a class that leaves torch's functions as they are: a parameter's, a masked weight's."""
    return type(tensor) is Tensor or type(tensor).__torch_function__ is NO_TORCH_FUNCTION


_CONVOLUTION_CALLS: dict[Any, AsCall] = {
    **{getattr(functional, f"conv{axes}d"): _forward(axes) for axes in (1, 2, 3)},
    **{getattr(functional, f"conv_transpose{axes}d"): _transposed(axes) for axes in (1, 2, 3)},
}
BILINEAR_CALLS: dict[Any, AsCall] = {
    functional.linear: _linear,
    functional.batch_norm: _batch_norm,
    **_CONVOLUTION_CALLS,
}

"""What the gradient of an operator's output says of the gradients that single samples give its parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from torch_flowprune.gradients.operators import convolution_of
from torch_flowprune.gradients.sample_squares.squared_sums import SquaredSums

Contribution: TypeAlias = Callable[[SquaredSums, int, Tensor], None]
"""From the gradient of the output to the sums of the parameter with this number."""
INNER = 2
"""The axis of samples where the first axis holds positions and in them samples."""
_FEW_POSITIONS = 64
"""Positions of a convolution up to which products of unfolded columns are faster than its own derivative."""


@dataclass(frozen=True)
class Tapped:
    """One use of parameters by an operator.

    Attributes:
        uses: the operands that may be parameters, each with what the output's gradient contributes to it.
        reads: the operand that is data, if any.
        shared: whether the output is one for all samples, and is handed on as a copy for each.
    """

    uses: Sequence[tuple[Tensor | None, Contribution]]
    reads: Tensor | None = None
    shared: bool = False


def sample_axis(tensor: Tensor, size: int) -> int | None:
    """The axis along which samples lie, or their parts one sample after the other."""
    if tensor.dim() and tensor.shape[0] == size:
        return 0
    if tensor.dim() > 2 and tensor.shape[1] == size:
        return 1
    return 0 if tensor.dim() and tensor.shape[0] and tensor.shape[0] % size == 0 else None


def tapped(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], size: int, axis: int | None) -> Tapped | None:
    """The use that a call makes of parameters, where it is understood; ``axis`` is that of its samples."""
    if (call := convolution_of(func, args, kwargs)) is not None:
        return _tapped_convolution(size, *call) if axis == 0 else None
    known = _TAPPED.get(func)
    return known(size, axis, *args, **kwargs) if known else None


def _by_position(values: Tensor, sums: SquaredSums, axis: int, last: int = 1) -> Tensor:
    """``(sample, position, feature)`` of values whose last axes are features."""
    features = values.shape[values.dim() - last :].numel()
    if axis == INNER:
        return values.reshape(-1, sums.size, features).transpose(0, 1)
    return (values.transpose(0, 1) if axis else values).reshape(sums.size, -1, features)


def _summed(axis: int, last: int = 1) -> Contribution:
    """A bias: the gradient, summed over positions."""
    return lambda sums, number, dy: sums.add(number, _by_position(dy, sums, axis, last).sum(1))


def _tapped_linear(
    size: int, axis: int | None, input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tapped | None:
    if axis is None or input.dim() < 2:
        return None
    x = input.detach()

    def product(sums: SquaredSums, number: int, dy: Tensor) -> None:
        sums.add_products(number, _by_position(dy, sums, axis), _by_position(x, sums, axis))

    return Tapped([(weight, product), (bias, _summed(axis))], input)


def _matmul(size: int, axis: int | None, input: Any, other: Any, bias: Tensor | None = None) -> Tapped | None:
    if axis is None or not isinstance(input, Tensor) or input.dim() < 2 or other.dim() != 2:
        return None
    x = input.detach()

    def product(sums: SquaredSums, number: int, dy: Tensor) -> None:
        sums.add_products(number, _by_position(x, sums, axis), _by_position(dy, sums, axis))

    return Tapped([(other, product), (bias, _summed(axis))], input)


def _addmm(size: int, axis: int | None, input: Tensor, mat1: Tensor, mat2: Tensor) -> Tapped | None:
    return _matmul(size, axis, mat1, mat2, input)


def _layer_norm(
    size: int, axis: int | None, input: Tensor, normalized_shape: Sequence[int],
    weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5,
) -> Tapped | None:  # fmt: skip
    if axis is None or input.dim() <= len(normalized_shape):
        return None
    x, last = input.detach(), len(normalized_shape)

    def scaled(sums: SquaredSums, number: int, dy: Tensor) -> None:
        normal = functional.layer_norm(x, normalized_shape, eps=eps)
        sums.add(number, _by_position(dy * normal, sums, axis, last).sum(1))

    return Tapped([(weight, scaled), (bias, _summed(axis, last))], input)


def _by_channel(values: Tensor, sums: SquaredSums) -> Tensor:
    """``(sample, channel)``, summed over space and over the parts of a sample."""
    over_space = values.flatten(2).sum(2) if values.dim() > 2 else values
    return over_space.reshape(sums.size, -1, values.shape[1]).sum(1)


def _channel_sums(sums: SquaredSums, number: int, dy: Tensor) -> None:
    sums.add(number, _by_channel(dy, sums))


def _tapped_batch_norm(
    size: int, axis: int | None, input: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    weight: Tensor | None = None, bias: Tensor | None = None, training: bool = False,
    momentum: float = 0.1, eps: float = 1e-5,
) -> Tapped | None:  # fmt: skip
    if axis != 0 or training or running_mean is None or running_var is None:
        return None
    x, mean, scale = input.detach(), running_mean, (running_var + eps).rsqrt()

    def scaled(sums: SquaredSums, number: int, dy: Tensor) -> None:
        sums.add(number, (_by_channel(dy * x, sums) - mean * _by_channel(dy, sums)) * scale)

    return Tapped([(weight, scaled), (bias, _channel_sums)], input)


def _group_norm(
    size: int, axis: int | None, input: Tensor, num_groups: int,
    weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5,
) -> Tapped | None:  # fmt: skip
    if axis != 0:
        return None
    x = input.detach()

    def scaled(sums: SquaredSums, number: int, dy: Tensor) -> None:
        sums.add(number, _by_channel(dy * functional.group_norm(x, num_groups, eps=eps), sums))

    return Tapped([(weight, scaled), (bias, _channel_sums)], input)


def _tapped_convolution(size: int, operator: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tapped:
    data, kernel = x.detach(), w.detach()
    each = len(data) // size

    def product(sums: SquaredSums, number: int, dy: Tensor) -> None:
        def gradient(i: int) -> Tensor:
            own = slice(i * each, (i + 1) * each)
            result: Tensor = operator.transposes(dy[own], data[own], kernel, (False, True, False))[1]
            return result

        if operator.columns and each == 1 and dy.flatten(2).shape[2] <= _FEW_POSITIONS:
            sums.add_products(number, dy.flatten(2).transpose(1, 2), operator.columns(data))
        else:
            sums.add_each(number, gradient)

    return Tapped([(w, product), (b, _channel_sums)], x)


def _embedding(
    size: int, axis: int | None, input: Tensor, weight: Tensor, padding_idx: int | None = None,
    max_norm: float | None = None, norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
) -> Tapped | None:  # fmt: skip
    if max_norm is not None or scale_grad_by_freq:
        return None
    shared = axis is None or (input.dim() > 1 and input.shape[0] == 1)
    if axis == 1:
        return None
    count = len(weight)

    def rows(sums: SquaredSums, number: int, dy: Tensor) -> None:
        ids = input.expand(size, *input.shape[1 if input.dim() > 1 else 0 :]) if shared else input
        ids, values = ids.reshape(size, -1), dy.reshape(size, -1, dy.shape[-1])
        if padding_idx is not None:
            values = values * (ids != padding_idx % count)[..., None]
        sums.add_rows(number, ids, values)

    return Tapped([(weight, rows)], None, shared)


def _spread(other: Any) -> Contribution:
    """A parameter that meets every sample, element by element: times something, or not."""

    def contribute(sums: SquaredSums, number: int, dy: Tensor) -> None:
        values = dy if other is None else dy * other
        shape = sums.totals[number].shape
        aligned = (1,) * (values.dim() - len(shape)) + tuple(shape)
        values = values.reshape(sums.size, -1, *values.shape[1:]).sum(1)
        over = [axis for axis in range(1, values.dim()) if aligned[axis] == 1 < values.shape[axis]]
        sums.add(number, (values.sum(over, keepdim=True) if over else values).reshape(sums.size, *shape))

    return contribute


def _meets_samples(parameter: Any, result_shape: torch.Size) -> bool:
    """Whether a parameter is spread over the axis of samples."""
    return isinstance(parameter, Tensor) and (len(parameter.shape) < len(result_shape) or parameter.shape[0] == 1)


def _elementwise(times: bool) -> Callable[..., Tapped | None]:
    def use(size: int, axis: int | None, input: Any, other: Any, **options: Any) -> Tapped | None:
        if options or axis != 0 or not (isinstance(input, Tensor) and isinstance(other, Tensor)):
            return None
        shape = torch.broadcast_shapes(input.shape, other.shape)
        sides = [(one, two) for one, two in ((input, other), (other, input)) if _meets_samples(one, shape)]
        uses = [(one, _spread(two.detach() if times else None)) for one, two in sides if len(two.shape) == len(shape)]
        return Tapped(uses, other if uses and uses[0][0] is input else input) if uses else None

    return use


def _expand(size: int, axis: int | None, input: Tensor, *sizes: Any) -> Tapped | None:
    wanted = sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    if not wanted or wanted[0] != size or not _meets_samples(input, torch.Size([1] * len(wanted))):
        return None
    return Tapped([(input, _spread(None))])


def _part(size: int, axis: int | None, input: Tensor, index: Any) -> Tapped | None:
    """A slice of a parameter, such as the positions that a sequence has."""
    entries = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(entry, (slice, EllipsisType)) for entry in entries):
        return None

    def contribute(sums: SquaredSums, number: int, dy: Tensor) -> None:
        sums.add(number, dy.reshape(size, -1), index)

    return Tapped([(input, contribute)], None, shared=True)


_TAPPED: dict[Any, Callable[..., Tapped | None]] = {
    functional.linear: _tapped_linear,
    torch.addmm: _addmm,
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), _matmul),
    functional.layer_norm: _layer_norm,
    functional.batch_norm: _tapped_batch_norm,
    functional.group_norm: _group_norm,
    functional.embedding: _embedding,
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), _elementwise(times=False)),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _elementwise(times=True)),
    Tensor.expand: _expand,
    Tensor.__getitem__: _part,
}

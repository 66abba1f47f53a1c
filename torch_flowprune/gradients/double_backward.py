"""Operators for gradients that are differentiated again.

Those that have a second derivative, and cheap ones where most of the time goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from torch_flowprune.torch_internals import (
    HARDSIGMOIDS,
    batch_norm_backward,
    convolution_backward,
    has_hooks,
    in_function_transform,
    unsafe_view,
)

Operands: TypeAlias = "tuple[Bilinear, Tensor, Tensor, Tensor | None]"
Substitute: TypeAlias = "Callable[..., Tensor | Operands | None]"
Found: TypeAlias = "tuple[Tensor | None, Tensor | None, Tensor | None]"
Wanted: TypeAlias = "tuple[bool, bool, bool]"

_aten = torch.ops.aten


@contextmanager
def twice_differentiable() -> Iterator[Reading]:
    """Inside, a forward uses operators that have second derivatives: plain attention, relu6 for hardsigmoid.

    Convolutions, linear layers and batch norms in eval mode go through :class:`_Product`.
    """
    reading = Reading()
    with sdpa_kernel(SDPBackend.MATH), _Substitutes(reading):
        yield reading


class Reading:
    """Whether the values of a gradient are read, or only what they depend on.

    Then those of the weights are left out.
    """

    values = True

    @contextmanager
    def none(self) -> Iterator[None]:
        """Inside, no value of a weight's gradient is read. A loss that takes gradients itself is computed outside."""
        self.values = False
        try:
            yield
        finally:
            self.values = True


def check_twice(outputs: Iterable[Tensor]) -> None:
    """A once_differentiable function leaves a node that raises, but that ``torch.autograd.grad`` never visits."""
    seen: set[Any] = set()
    todo: list[Any] = [output.grad_fn for output in outputs]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        if node.name() == "torch::autograd::Error":
            raise RuntimeError("a function of the model is marked once_differentiable")
        seen.add(node)
        todo.extend(following for following, _ in node.next_functions)


@dataclass(frozen=True)
class Bilinear:
    """An operator ``y = x * w + b``, linear in w and affine in x, with the derivative that torch has for it.

    Attributes:
        product: ``(x, w, b) -> y``.
        transposes: ``(dy, x, w, wanted) -> dx, dw, db``; what is not wanted is None or anything.
        linear: the same operator without the constant, where it has one in x.
        reading: whether the values of ``dw`` are read where it is differentiated again.
    """

    product: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    transposes: Callable[[Tensor, Tensor, Tensor, Wanted], Found]
    linear: Bilinear | None = None
    reading: Reading = field(default_factory=Reading)


class _Product(Function):
    """``x * w + b``."""

    @staticmethod
    def forward(operator: Bilinear, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return operator.product(x, w, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.operator, x, w, _ = inputs
        ctx.save_for_backward(x, w)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, w = ctx.saved_tensors
        unread = not ctx.operator.reading.values and torch.is_grad_enabled() and w.is_leaf and not has_hooks(w)
        return None, *_Transposes.apply(ctx.operator, dy, x, w, ctx.needs_input_grad[1:], unread)


class _Transposes(Function):
    """The derivative of ``x * w + b``; its own derivative along (u, v) is the same operator at (u, v).

    torch's second derivative of a convolution goes group by group, and rearranges its operands to make one convolution
    of another.
    """

    @staticmethod
    def forward(operator: Bilinear, dy: Tensor, x: Tensor, w: Tensor, wanted: Wanted, unread: bool) -> Found:
        found = operator.transposes(dy, x, w, (wanted[0], wanted[1] and not unread, wanted[2]))
        dx, dw, db = (value if want else None for value, want in zip(found, wanted, strict=True))
        return dx, w.new_zeros(()).expand_as(w) if wanted[1] and unread else dw, db

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Found) -> None:
        ctx.operator, dy, x, w, _, _ = inputs
        ctx.save_for_backward(dy, x, w)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, v: Tensor | None, b: Tensor | None) -> Any:
        dy, x, w = ctx.saved_tensors
        needs_dy, needs_x, needs_w = ctx.needs_input_grad[1:4]
        linear, ddy = ctx.operator.linear or ctx.operator, None
        if needs_dy and not v is b is None:
            ddy = ctx.operator.product(x, torch.zeros_like(w) if v is None else v, b)
        if needs_dy and u is not None:
            ddy = linear.product(u, w, None) if ddy is None else ddy.add_(linear.product(u, w, None))
        wanted = needs_x and v is not None, needs_w and u is not None, False
        dx, dw, _ = (
            linear.transposes(dy, x if u is None else u, w if v is None else v, wanted) if any(wanted) else (None,) * 3
        )
        return None, ddy, dx if wanted[0] else None, dw if wanted[1] else None, None, None


class _Substitutes(TorchFunctionMode):
    """Operators replaced on their way in, by equal ones."""

    def __init__(self, reading: Reading) -> None:
        super().__init__()
        self.reading = reading

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = _substitute(func, args, kwargs or {})
        if found is None:
            return func(*args, **(kwargs or {}))
        if isinstance(found, Tensor):
            return found
        operator, x, w, b = found
        return _Product.apply(replace(operator, reading=self.reading), x, w, b)


def _substitute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | Operands | None:
    substitute = _SUBSTITUTES.get(func)
    return substitute(*args, **kwargs) if substitute else None


def convolution_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operands | None:
    """The call of a convolution as the operator and its operands; None for any other call."""
    found = _substitute(func, args, kwargs) if func in _CONVOLUTIONS else None
    return None if isinstance(found, Tensor) else found


def _hardsigmoid(input: Tensor, *_: Any, **__: Any) -> Tensor:
    """The ``relu6(x + 3) / 6`` that it is defined to be: equal values, and a second derivative that torch knows."""
    return functional.relu6(input + 3) / 6


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Operands | None:
    if not (_plain(input, weight, bias) and input.dim() >= 2 == weight.dim()):
        return None
    return Bilinear(_linear_product, _linear_transposes), input, weight, bias


def _linear_product(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """Not as a view of the product of all rows, as older versions of torch give it.

    Autograd would refuse to have it written in place.
    """
    found = _aten.linear(x, w, b)
    return unsafe_view(found, found.shape)  # type: ignore[no-any-return]


def _linear_transposes(dy: Tensor, x: Tensor, w: Tensor, wanted: Wanted) -> Found:
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
) -> Operands | None:
    """``sizes`` are stride, padding, dilation and output padding: numbers or tuples of them.

    A padding in words stays torch's.
    """
    if not _plain(input, weight, bias) or input.dim() != axes + 2 or any(isinstance(size, str) for size in sizes):
        return None
    stride, padding, dilation, more = ([size] * axes if isinstance(size, int) else list(size) for size in sizes)
    options = stride, padding, dilation, transposed, more, groups

    def product(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return _aten.convolution(x, w, b, *options)  # type: ignore[no-any-return]

    def transposes(dy: Tensor, x: Tensor, w: Tensor, wanted: Wanted) -> Found:
        return convolution_backward(dy, x, w, [dy.shape[1]], *options, wanted)  # type: ignore[no-any-return]

    return Bilinear(product, transposes), input, weight, bias


def _forward(axes: int) -> Substitute:
    def convolution(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Operands | None:
        return _convolution(axes, input, weight, bias, (stride, padding, dilation, 0), transposed=False, groups=groups)

    return convolution


def _transposed(axes: int) -> Substitute:
    def convolution(
        input: Tensor, weight: Tensor, bias: Tensor | None = None,
        stride: Any = 1, padding: Any = 0, output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
    ) -> Operands | None:  # fmt: skip
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
) -> Operands | None:
    """In eval mode: every channel shifted and scaled by constants, then ``* w + b``."""
    if (
        training
        or running_mean is None
        or running_var is None
        or not _plain(input, running_mean, running_var, weight, bias)
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

    def transposes(dy: Tensor, x: Tensor, w: Tensor, wanted: Wanted) -> Found:
        return batch_norm_backward(dy, x, w, mean, var, None, None, False, eps, wanted)  # type: ignore[no-any-return]

    return Bilinear(product, transposes, linear)


def _plain(*tensors: Tensor | None) -> bool:
    """Whether these are what the operators above are for.

    Real, dense, all of one type, outside of autocast and functional transforms.
    """
    found = [tensor for tensor in tensors if tensor is not None]
    return (
        all(type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided for tensor in found)
        and found[0].is_floating_point()
        and len({tensor.dtype for tensor in found}) == 1
        and not torch.is_autocast_enabled(found[0].device.type)
        and not in_function_transform()
    )


_CONVOLUTIONS: dict[Any, Substitute] = {
    **{getattr(functional, f"conv{axes}d"): _forward(axes) for axes in (1, 2, 3)},
    **{getattr(functional, f"conv_transpose{axes}d"): _transposed(axes) for axes in (1, 2, 3)},
}
_SUBSTITUTES: dict[Any, Substitute] = {
    **dict.fromkeys(HARDSIGMOIDS, _hardsigmoid),
    functional.linear: _linear,
    functional.batch_norm: _batch_norm,
    **_CONVOLUTIONS,
}

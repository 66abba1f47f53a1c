"""Operators for gradients that are differentiated again.

Those that have a second derivative, and cheap ones where most of the time goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from torch_flowprune.gradients.operators.bilinear_operators import (
    BILINEAR_CALLS,
    Bilinear,
    BilinearCall,
    Gradients,
    Wanted,
)
from torch_flowprune.gradients.operators.embedding_bags import bag_of_embeddings
from torch_flowprune.gradients.operators.tiled_attention import attention_of_long_sequences
from torch_flowprune.gradients.operators.twice_differentiable_losses import (
    connectionist_temporal_classification,
    margin_of_classes,
    margin_of_labels,
)
from torch_flowprune.torch_internals import (
    HARDSIGMOID_IN_PLACE,
    HARDSIGMOIDS,
    fused_weight_norm,
    has_hooks,
    made_of_operators,
    past_modes,
)


@contextmanager
def twice_differentiable(*, values_read: bool = True) -> Iterator[WeightGradients]:
    """Inside, a forward uses operators that have second derivatives: attention in tiles, relu6 for hardsigmoid.

    Sums of embeddings are plain ones, and so are losses whose kernels have none. Of weight norm torch has one, and it
    is wrong: the plain formula takes its place. Convolutions, linear layers and batch norms in eval mode go through
    :class:`_Product`; linear layers where a gradient's value is left out (``values_read``), as nothing else is saved.
    """
    weight_gradients = WeightGradients(values_read)
    substitutes = _Substitutes(weight_gradients)
    try:
        with sdpa_kernel(SDPBackend.MATH), substitutes:
            yield weight_gradients
    except RuntimeError as error:
        if not substitutes.nested and "nested" not in str(error).lower():  # seen here, or when the graph was made
            raise
        raise RuntimeError(
            "H·g takes second derivatives, which torch lacks for some operators of nested tensors: pass padded tensors "
            f"with a mask, or lists of samples, or use a measure that reads only g (torch says: {error})"
        ) from error


class WeightGradients:
    """Whether the values of the weights' gradients are read, or only what they depend on: then they are left out."""

    def __init__(self, always_read: bool) -> None:
        self.always_read, self.read = always_read, True

    @contextmanager
    def unread(self) -> Iterator[None]:
        """Inside, no value of a weight's gradient is read. A loss that takes gradients itself is computed outside."""
        self.read = False
        try:
            yield
        finally:
            self.read = True


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


class _Product(Function):
    """``x * w + b``."""

    @staticmethod  # what is saved, saved here: for a method of its own torch inspects the signature in every call
    def forward(
        ctx: Any, operator: Bilinear, x: Tensor, w: Tensor, b: Tensor | None, weight_gradients: WeightGradients
    ) -> Tensor:
        ctx.operator, ctx.weight_gradients = operator, weight_gradients
        ctx.save_for_backward(x, w)
        return operator.product(x, w, b)

    @staticmethod
    @past_modes
    def backward(ctx: Any, saved: Any, dy: Tensor) -> Any:
        x, w = saved
        unread = not ctx.weight_gradients.read and torch.is_grad_enabled() and w.is_leaf and not has_hooks(w)
        return None, *_Transposes.apply(ctx.operator, dy, x, w, ctx.needs_input_grad[1:4], unread), None


class _Transposes(Function):
    """The derivative of ``x * w + b``; its own derivative along (u, v) is the same operator at (u, v).

    torch's second derivative of a convolution goes group by group, and rearranges its operands to make one convolution
    of another.
    """

    @staticmethod
    def forward(
        ctx: Any, operator: Bilinear, dy: Tensor, x: Tensor, w: Tensor, wanted: Wanted, unread: bool
    ) -> Gradients:
        ctx.operator = operator
        ctx.save_for_backward(dy, x, w)
        ctx.set_materialize_grads(False)
        grads = operator.transposes(dy, x, w, (wanted[0], wanted[1] and not unread, wanted[2]))
        dx, dw, db = (grad if want else None for grad, want in zip(grads, wanted, strict=True))
        return dx, w.new_zeros(()).expand_as(w) if wanted[1] and unread else dw, db

    @staticmethod
    @past_modes
    def backward(ctx: Any, saved: Any, u: Tensor | None, v: Tensor | None, b: Tensor | None) -> Any:
        dy, x, w = saved
        needs_dy, needs_x, needs_w = ctx.needs_input_grad[1:4]
        linear, ddy = ctx.operator.linear or ctx.operator, None
        if needs_dy and (v is not None or b is not None):
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

    def __init__(self, weight_gradients: WeightGradients) -> None:
        super().__init__()
        self.weight_gradients, self.nested = weight_gradients, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _OF_OPERATORS:
            with self:
                return _OF_OPERATORS[func](*args, **(kwargs or {}))
        if args and isinstance(args[0], Tensor) and args[0].is_nested:
            self.nested = True
            return func(*args, **(kwargs or {}))
        plain = func is functional.linear and self.weight_gradients.always_read
        substitute = None if plain else _SUBSTITUTES.get(func)
        substituted = substitute(*args, **(kwargs or {})) if substitute else None
        if substituted is None:
            return func(*args, **(kwargs or {}))
        if isinstance(substituted, Tensor):
            return substituted
        return _Product.apply(*substituted, self.weight_gradients)


def _hardsigmoid(input: Tensor, inplace: bool = False, *, out: Tensor | None = None) -> Tensor | None:
    """The ``relu6(x + 3) / 6`` that it is defined to be: equal values, and a second derivative that torch knows."""
    if out is not None:
        return None
    value = functional.relu6(input + 3) / 6
    return input.copy_(value) if inplace else value


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``g v / ‖v‖``, with the norm over all axes but one (-1: over all), as torch's own is differentiated wrongly."""
    axes = [axis for axis in range(v.dim()) if axis != dim]
    norm: Tensor = torch.linalg.vector_norm(v, dim=axes, keepdim=dim != -1)
    return v * (g / norm)


_SUBSTITUTES: dict[Any, Callable[..., Tensor | BilinearCall | None]] = {
    **dict.fromkeys(HARDSIGMOIDS, _hardsigmoid),
    HARDSIGMOID_IN_PLACE: partial(_hardsigmoid, inplace=True),
    fused_weight_norm: _weight_norm,
    functional.scaled_dot_product_attention: attention_of_long_sequences,
    functional.embedding_bag: bag_of_embeddings,
    **dict.fromkeys((functional.ctc_loss, torch.ctc_loss), connectionist_temporal_classification),
    functional.multi_margin_loss: margin_of_classes,
    functional.multilabel_margin_loss: margin_of_labels,
    **BILINEAR_CALLS,
}
_OF_OPERATORS = {functional.multi_head_attention_forward: made_of_operators(functional.multi_head_attention_forward)}

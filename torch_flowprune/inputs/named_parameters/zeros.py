"""Zeros under a mask, which is true where a value is kept: bool, or numbers, as torch's own methods make them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from torch_flowprune.inputs.shards import local
from torch_flowprune.torch_internals import is_read_as_a_graph, keep_where_positive

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def flags(mask: Tensor) -> Tensor:
    """A mask as bool."""
    return mask if mask.dtype is torch.bool else mask != 0


def lasting(value: Tensor) -> Tensor:
    """A tensor for a model to keep: one made in inference mode no backward takes, and no optimizer moves."""
    if not value.is_inference():
        return value
    with torch.inference_mode(False):
        return value.clone()


def masked(value: Tensor, mask: Tensor) -> Tensor:
    """``value`` where the mask is true, exactly 0 elsewhere.

    A selection, not a product: 0·inf would be nan. By the operator of the derivative of ``relu``, which is one, and a
    tenth of the time of ``torch.where`` on a CPU, forward and backward (``docs/architecture.md``). Who reads a graph
    off the code finds ``torch.where``, and so does who differentiates forward.
    """
    found = _selected(value, mask)
    return _masked_otherwise(value, flags(mask)) if found is None else found


def masked_for_now(value: Tensor, mask: Tensor) -> tuple[Tensor, bool]:
    """:func:`masked`, and whether nobody reads a graph off the code that asks."""
    found = _selected(value, mask)
    if found is not None:
        return found, True
    return _masked_otherwise(value, flags(mask)), not is_read_as_a_graph()


def _selected(value: Tensor, mask: Tensor) -> Tensor | None:
    """Plain numbers under a plain mask, selected by one operator; None for all else."""
    if (
        value.dtype in _SELECTABLE
        and type(value) in _PLAIN
        and type(mask) in _PLAIN
        and (value.is_cpu or value.is_cuda)  # whose operators take a value and a mask of two dtypes
        and value.layout is torch.strided
        and mask.dtype is torch.bool
        and not _open
        and not is_read_as_a_graph()
    ):
        return keep_where_positive(value, mask.view(torch.uint8), 0)  # type: ignore[no-any-return]
    return None


def _masked_otherwise(value: Tensor, kept: Tensor) -> Tensor:
    tracked = value.requires_grad and torch.is_grad_enabled()
    if _open and tracked:
        return _Opened.apply(value, kept)  # type: ignore[no-any-return]
    if is_read_as_a_graph() or not _has_bits(value, kept):
        return torch.where(kept, value, 0)
    if tracked:
        return _Masked.apply(value, kept)  # type: ignore[no-any-return]
    return _bits_kept(value, kept)


@contextmanager
def gradients_under_masks() -> Iterator[None]:
    """Inside, a masked value hands its gradient on to all of what it was made of, under the mask too."""
    _open.append(True)
    try:
        yield
    finally:
        _open.pop()


_open: list[bool] = []
_PLAIN = (Tensor, torch.nn.Parameter)
_SELECTABLE = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})


def _has_bits(value: Tensor, kept: Tensor) -> bool:
    """Whether the value is a plain tensor of numbers that are as wide as whole ones, and as they lie in memory."""
    plain = type(value) in _PLAIN and type(kept) in _PLAIN and value.layout is torch.strided
    lazy = value.is_complex() or value.is_neg() or value.is_quantized
    return plain and not lazy and value.shape == kept.shape and value.dtype.itemsize in _INTEGERS


def _bits_kept(value: Tensor, kept: Tensor) -> Tensor:
    """No view of whole numbers: a gradient may be one that users detach in place."""
    bits, new = _INTEGERS[value.dtype.itemsize], torch.empty_like(value)
    torch.mul(value.view(bits), kept, out=new.view(bits))
    return new


class _Masked(torch.autograd.Function):
    """Bits kept, as often as it is differentiated: for numbers of eight bits, and devices of other makers."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(kept)
        return _bits_kept(value, kept)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return masked(gradient, *ctx.saved_tensors), None


class _Opened(_Masked):
    """The same values, and the gradient that they had without the mask."""

    @staticmethod
    def forward(_ctx: Any, value: Tensor, kept: Tensor) -> Tensor:
        return masked(value.detach(), kept)

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Any:
        return gradient, None


def clear(value: Tensor, mask: Tensor) -> Tensor:
    """:func:`masked` in place, on the value's device, and past autograd; returns the value. Of shards both are parts.

    Bits times 0 or 1, which takes a tenth to a third of the time of a selection.
    """
    numbers, kept = local(value), local(flags(mask)).to(value.device)
    bits = _INTEGERS.get(value.dtype.itemsize)
    if bits is None:
        numbers.masked_fill_(~kept, 0)
    else:
        numbers.view(bits).mul_(kept)
    return value

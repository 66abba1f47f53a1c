"""Batch and instance norms whose gradient torch gets wrong on a CPU: one sample, and two layouts.

The kernel goes through a sample's input and the gradient of its output side by side, and where the layouts of the two
differ (a transpose after the norm, as hybrid transformers have it) it pairs values of different places. Instance norm
is a batch norm of one sample, whatever the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from torch_flowprune.torch_internals import batch_norm_backward

_BATCH_NORMS = (functional.batch_norm, torch.batch_norm)
_INSTANCE_NORMS = (functional.instance_norm, torch.instance_norm)


def sound_norms(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, norms of a forward get the gradient of their output in the layout of their input, where it matters."""
    return _OneLayout() if device.type == "cpu" and _layouts_are_mixed_up() else nullcontext()


@cache
def _layouts_are_mixed_up() -> bool:
    """Whether this torch has the fault: asked once, of nine places in two channels."""
    x = torch.arange(18.0, device="cpu").view(1, 2, 3, 3)
    w, zeros = torch.ones(2, device="cpu"), torch.zeros(2, device="cpu")
    transposed = x.flatten(2).mT.contiguous().mT.view(x.shape)
    found, expected = (
        batch_norm_backward(dy, x, w, zeros, w, None, None, False, 0.0, (True, True, True))[1] for dy in (transposed, x)
    )
    return not torch.allclose(found, expected)


class _OneLayout(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in _BATCH_NORMS or func in _INSTANCE_NORMS:
            x = args[0] if args else (kwargs or {})["input"]
            if (len(x) == 1 or func in _INSTANCE_NORMS) and output.requires_grad and not torch.compiler.is_compiling():
                output.register_hook(_contiguous if func in _INSTANCE_NORMS else _laid_out_as(x))
        return output


def _laid_out_as(x: Tensor) -> Callable[[Tensor], Tensor]:
    if x.is_contiguous():
        return _contiguous
    strides = torch.empty_like(x, device="meta").stride()  # of an expanded input, those of its values written out

    def laid_out(grad: Tensor) -> Tensor:
        return grad if grad.stride() == strides else grad.new_empty_strided(grad.shape, strides).copy_(grad)

    return laid_out


def _contiguous(grad: Tensor) -> Tensor:
    """As most inputs are, and as instance norm makes its own."""
    return grad.contiguous()

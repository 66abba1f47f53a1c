"""Tensor parallelism twice differentiable: what sums gradients over ranks is part of the graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


class _Settled(Function):
    """The tensor itself; its gradient comes out distributed as is wanted, by a step that is part of the graph.

    torch takes that step outside of it, in the backward of ``DTensor.from_local``, and what the gradient depends on
    is then lost.
    """

    @staticmethod
    def forward(ctx: Any, x: Any, placements: Any) -> Any:
        ctx.placements = placements
        ctx.set_materialize_grads(False)  # zeros that autograd makes up are plain tensors
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        if grad is None or tuple(grad.placements) == ctx.placements:
            return grad, None
        return grad.redistribute(placements=ctx.placements), None


@contextmanager
def settled_gradients() -> Iterator[None]:
    """Inside, this is so for all that ``DTensor.from_local`` makes."""
    from torch.distributed.tensor import DTensor, Replicate

    tensors: Any = DTensor
    before = vars(tensors)["from_local"]
    plain = before.__func__

    def from_local(local_tensor: Tensor, *args: Any, grad_placements: Any = None, **kwargs: Any) -> Any:
        more = {} if grad_placements is None else {"grad_placements": grad_placements}
        made = plain(local_tensor, *args, **more, **kwargs)
        if not (made.requires_grad and torch.is_grad_enabled()):
            return made
        wanted = grad_placements or [Replicate() if one.is_partial() else one for one in made.placements]
        return _Settled.apply(made, tuple(wanted))

    tensors.from_local = staticmethod(from_local)
    try:
        yield
    finally:
        tensors.from_local = before

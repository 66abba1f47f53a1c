"""One parameter that ranks hold in parts: its own part as a leaf of autograd, the whole of it, and the way back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from torch_flowprune.inputs import Ranks, Target, alike, as_shard_of, is_sharded, local


class Layout:
    """How a tensor lies over a mesh: which rank has which part."""

    def __init__(self, mesh: Any, placements: Sequence[Any], like: Any) -> None:
        self.mesh, self.placements = mesh, tuple(placements)
        self.shape, self.stride = torch.Size(like.shape), tuple(_stride_of(like))

    def laid(self, part: Tensor) -> Any:
        """A distributed tensor of the parts; autograd goes through."""
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            part, self.mesh, self.placements, run_check=False, shape=self.shape, stride=self.stride
        )

    def whole(self, part: Tensor) -> Tensor:
        """Every rank's part, put together on each of them."""
        from torch.distributed.tensor import Replicate

        whole: Tensor = self.laid(part).redistribute(placements=[Replicate()] * self.mesh.ndim).to_local()
        return whole

    def part_of_sum(self, whole: Tensor) -> Tensor:
        """This rank's part of the sum over ranks, of which each has a whole tensor."""
        from torch.distributed.tensor import DTensor, Partial

        laid = DTensor.from_local(whole, self.mesh, [Partial()] * self.mesh.ndim, run_check=False)
        part: Tensor = laid.redistribute(placements=self.placements).to_local()
        return part


def _stride_of(like: Any) -> Sequence[int]:
    stride: Sequence[int] = like.stride() if callable(like.stride) else like.stride
    return stride


class Shard:
    """A parameter of a model that runs on several ranks.

    Attributes:
        leaf: this rank's part, in the parameter's own memory: what gradients are taken with respect to.
        over_data: how parts lie over the ranks that have data of their own; None where each has the whole.
        in_forward: how what the forward computes with is itself distributed (tensor parallelism); None for a tensor.
        reached: whether the loss was seen to depend on it.
        squares: the part of the sum over ranks of squared gradients, where these are wanted.
        kept: this rank's part of the mask, where that lies beside the shard and no forward computes with it.
    """

    kept: Tensor | None = None

    def __init__(
        self, parameter: nn.Parameter, over_data: Layout | None, in_forward: Layout | None, ranks: Ranks
    ) -> None:
        self.parameter, self.over_data, self.in_forward, self.ranks = parameter, over_data, in_forward, ranks
        self.leaf = nn.Parameter(local(parameter), requires_grad=parameter.requires_grad)
        self.reached = False
        self.squares: Tensor | None = None

    def gathered(self, part: Tensor) -> Tensor:
        """What this rank computes with, whole but for what tensor parallelism cuts; no graph."""
        part = self._cleared(part.detach())
        return part if self.over_data is None else self.over_data.whole(part)

    def summed(self, whole: Tensor) -> Tensor:
        """The way back: this rank's part of the sum over the ranks' data; no graph."""
        if self.over_data is not None:
            return self._cleared(self.over_data.part_of_sum(whole.detach()))
        self.ranks.sum([total := whole.detach().clone()])
        return self._cleared(total)

    def _cleared(self, part: Tensor) -> Tensor:
        return part if self.kept is None else torch.where(self.kept, part, 0)

    def returned(self, whole: Tensor | None, like: Tensor, share: float | None) -> Tensor:
        """:meth:`summed` of a gradient; zeros for one that is None, as other ranks may have one.

        ``share`` is by what this rank's loss was multiplied, where squares of each rank's own gradient are wanted.
        """
        self.reached = self.reached or whole is not None
        grad = torch.zeros_like(like) if whole is None else whole
        if share is not None:
            if self.squares is not None:
                raise RuntimeError(
                    "g2 is made of whole gradients of each rank, and a part of the model under fully_shard runs more "
                    "than once in a forward: use g or Hg, or g2 of a model that is not sharded"
                )
            self.squares = self.summed(grad.square() / share if share else torch.zeros_like(grad))
        return self.summed(grad)

    def in_module(self, whole: Tensor) -> Tensor:
        """What the module holds while it runs."""
        return whole if self.in_forward is None else self.in_forward.laid(whole)

    def handed_out(self, part: Tensor) -> Tensor:
        """Values of this rank's part as the parameter is: over its mesh, in its placements."""
        return alike(part, self.parameter)

    def own_part(self, value: Tensor) -> Tensor:
        """This rank's part of a value in the parameter's shape, distributed in any way or whole on each rank."""
        return local(as_shard_of(value, self.parameter))


class Gathered(Function):
    """The whole parameter, held until the graph is gone; its derivative is the sum over ranks, and so on and back."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, shard: Shard, share: float | None) -> Tensor:
        ctx.shard, ctx.share = shard, share
        whole = shard.gathered(part)
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Returned.apply(grad, ctx.shard, ctx.share), None, None


class _Returned(Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, shard: Shard, share: float | None) -> Tensor:
        ctx.shard = shard
        return shard.returned(whole, whole, share)

    @staticmethod
    def backward(ctx: Any, part: Tensor) -> Any:
        return Gathered.apply(part, ctx.shard, None), None, None


def theta_of(target: Target) -> Tensor:
    """The values that the forward uses, as :attr:`Target.theta` has them, of a shard under a whole mask too."""
    if target.mask is None or not is_sharded(target.parameter):
        return target.theta
    return replace(target, mask=as_shard_of(target.mask, target.parameter)).theta

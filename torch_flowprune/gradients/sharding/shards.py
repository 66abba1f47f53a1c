"""One parameter that ranks hold in parts: its own part as a leaf of autograd, the whole of it, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

    def summed_over_copies(self, part: Tensor) -> Tensor:
        """The sum of what the ranks have that have the same part."""
        total = part.clone()
        for axis, placement in enumerate(self.placements):
            if placement.is_replicate():
                torch.distributed.all_reduce(total, group=self.mesh.get_group(axis))
        return total


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
        told: is called with what the module holds while it runs, whenever it comes to hold it.
    """

    kept: Tensor | None = None
    told: Callable[[Tensor], object] | None = None

    def __init__(
        self, parameter: nn.Parameter, over_data: Layout | None, in_forward: Layout | None, ranks: Ranks
    ) -> None:
        self.parameter, self.over_data, self.in_forward, self.ranks = parameter, over_data, in_forward, ranks
        self.leaf = nn.Parameter(local(parameter), requires_grad=parameter.requires_grad)
        self.reached = False
        self.squares: Tensor | None = None

    def hold(self, part: Tensor) -> None:
        """From now on another value of this rank's part."""
        requires_grad = part.is_floating_point() and self.leaf.requires_grad
        self.leaf = nn.Parameter(part, requires_grad=requires_grad)

    def gathered(self, part: Tensor) -> Tensor:
        """What this rank computes with, whole but for what tensor parallelism cuts; no graph."""
        part = self._cleared(part.detach())
        return part if self.over_data is None else self.over_data.whole(part)

    def summed(self, whole: Tensor) -> Tensor:
        """The way back: this rank's part of the sum over the ranks' data, 0 under the mask; no graph."""
        return self._cleared(self.part_of_sum(whole.detach()))

    def part_of_sum(self, whole: Tensor) -> Tensor:
        """This rank's part of the sum, over ranks that have data of their own, of tensors as forwards compute with."""
        if self.over_data is not None:
            return self.over_data.part_of_sum(whole)
        self.ranks.sum([total := whole.clone()])
        return total

    def summed_over_copies(self, whole: Tensor) -> Tensor:
        """The sum over the ranks that compute with the same values under tensor parallelism, on parts of the inputs."""
        return whole if self.in_forward is None else self.in_forward.summed_over_copies(whole)

    def in_memory(self) -> Tensor:
        """A tensor without values, in the shape of what this rank's forward computes with."""
        shape = self.leaf.shape if self.over_data is None else self.over_data.shape
        return torch.empty(shape, dtype=self.leaf.dtype, device="meta")

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
                    "g2 is made of each rank's whole gradients, and a part of the model under fully_shard runs more "
                    "than once in a forward: use g or Hg, or g2 of a model that is not sharded"
                )
            self.squares = self.summed(grad.square() / share if share else torch.zeros_like(grad))
        return self.summed(grad)

    def in_module(self, whole: Tensor) -> Tensor:
        """What the module holds while it runs."""
        if self.told is not None:
            self.told(whole)
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
        return _Returned.apply(grad, ctx.shard.leaf, ctx.shard, ctx.share), None, None


class _Returned(Function):
    """Of the leaf too, with a derivative of 0: on all ranks its own is taken, whatever this rank's loss makes of it."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, _: Tensor, shard: Shard, share: float | None) -> Tensor:
        ctx.shard = shard
        return shard.returned(whole, whole, share)

    @staticmethod
    def backward(ctx: Any, part: Tensor) -> Any:
        return Gathered.apply(part, ctx.shard, None), None, None, None


def theta_of(target: Target) -> Tensor:
    """The values that the forward uses, as :attr:`Target.theta` has them, of a shard under a whole mask too."""
    if target.mask is None or not is_sharded(target.parameter):
        return target.theta
    return replace(target, mask=as_shard_of(target.mask, target.parameter)).theta

"""What may be removed from a parameter: its rows out, its mask back.

A granularity cuts one parameter into units. ``rows`` lays each unit's elements along the last axis, which is all a
measure sees; ``mask`` turns one kept/removed flag a unit into a mask of the parameter's shape.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from torch_flowprune.inputs import Target, flags


class Units(Protocol):
    """One way to cut a parameter."""

    def rows(self, tensor: Tensor) -> Tensor:
        """The tensor as ``(unit, element)``."""

    def mask(self, keep: Tensor, shape: torch.Size) -> Tensor:
        """``keep``, one bool per unit, as a bool tensor of the parameter's shape."""


Granularity: TypeAlias = str | Units | Callable[[Target], Units]
SHRINKABLE = ("channel", "block")
"""Granularities whose units are read off the whole model, so that ``shrink`` can build what is left."""


@dataclass(frozen=True)
class Weights:
    """Single weights: each weight is a unit. The same as ``granularity="weight"``.

    See Also:
        :class:`~torch_flowprune.Slices`, :class:`~torch_flowprune.Blocks`: other units.

    >>> import torch, torch_flowprune as fp
    >>> fp.Weights().rows(torch.zeros(2, 3)).shape
    torch.Size([6, 1])
    """

    def rows(self, tensor: Tensor) -> Tensor:
        """The tensor as ``(unit, element)``."""
        return tensor.reshape(-1, 1)

    def mask(self, keep: Tensor, shape: torch.Size) -> Tensor:
        """``keep``, one bool per unit, as a bool tensor of the parameter's shape."""
        return keep.view(shape)


@dataclass(frozen=True)
class Slices:
    """The slices along one axis, as in ``prune.ln_structured``: a convolution's filters for ``dim=0``.

    Args:
        dim: the axis along which the slices lie.

    See Also:
        :class:`~torch_flowprune.Weights`, :class:`~torch_flowprune.Blocks`: other units.

    >>> import torch, torch_flowprune as fp
    >>> fp.Slices(0).rows(torch.zeros(4, 3, 2, 2)).shape
    torch.Size([4, 12])
    """

    dim: int = 0

    def rows(self, tensor: Tensor) -> Tensor:
        """The tensor as ``(unit, element)``."""
        slices = tensor.movedim(self._axis(tensor), 0)
        return slices.flatten(1) if slices.dim() > 1 else slices.unsqueeze(1)

    def mask(self, keep: Tensor, shape: torch.Size) -> Tensor:
        """``keep``, one bool per unit, as a bool tensor of the parameter's shape."""
        view = [1] * len(shape)
        view[self.dim] = len(keep)
        return keep.view(view).expand(shape)

    def _axis(self, tensor: Tensor) -> int:
        if not -tensor.dim() <= self.dim < tensor.dim():
            raise ValueError(
                f"dim={self.dim} is not an axis of a tensor of shape {tuple(tensor.shape)}: expected {-tensor.dim()} "
                f"to {tensor.dim() - 1}"
            )
        return self.dim


@dataclass(frozen=True)
class GroupedOutputs:
    """The output channels of a transposed convolution in groups, whose weight is ``(inputs, outputs / groups, ...)``.

    A slice along the second axis would be one output of every group at once.

    >>> GroupedOutputs(2).rows(torch.zeros(4, 3, 5)).shape
    torch.Size([6, 10])
    """

    groups: int

    def rows(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.groups, -1, *tensor.shape[1:]).movedim(2, 1).flatten(0, 1).flatten(1)

    def mask(self, keep: Tensor, shape: torch.Size) -> Tensor:
        each = keep.view(self.groups, 1, shape[1], *(1,) * (len(shape) - 2))
        return each.expand(self.groups, shape[0] // self.groups, *shape[1:]).reshape(shape)


@dataclass(frozen=True)
class Blocks:
    """n:m sparsity: of every ``m`` consecutive weights along the input axis, ``n`` are kept. A unit is one weight.

    Args:
        n: how many weights of each block are kept.
        m: how many weights a block has.
        axis: the input axis, along which blocks lie.

    Raises:
        ValueError: unless 0 < n < m.

    See Also:
        :class:`~torch_flowprune.Weights`, :class:`~torch_flowprune.Slices`: other units.

    >>> import torch, torch_flowprune as fp
    >>> fp.Blocks(2, 4).rows(torch.zeros(3, 8)).shape
    torch.Size([24, 1])
    """

    n: int
    m: int
    axis: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise ValueError(
                f"granularity '{self.n}:{self.m}' keeps {self.n} of {self.m}: expected 0 < n < m, as in '2:4'"
            )

    def fits(self, shape: torch.Size) -> bool:
        """Whether the input axis divides into whole blocks."""
        return len(shape) > 1 and shape[self.axis] % self.m == 0

    def rows(self, tensor: Tensor) -> Tensor:
        """The tensor as ``(unit, element)``."""
        return tensor.movedim(self.axis, -1).reshape(-1, 1)

    def mask(self, keep: Tensor, shape: torch.Size) -> Tensor:
        """``keep``, one bool per unit, as a bool tensor of the parameter's shape."""
        moved = torch.empty(shape, device="meta").movedim(self.axis, -1).shape
        return keep.view(moved).movedim(-1, self.axis)


def parse_granularity(granularity: Granularity) -> Callable[[Target], Units]:
    """Resolve a ``granularity`` argument to the way each parameter is cut into units.

    Args:
        granularity: ``"weight"``, ``"filter"`` (slices along the output axis), ``"n:m"``, an object with ``rows`` and
            ``mask``, or a function of the target (a ``Target`` has ``name``, ``parameter`` and ``output_axis``) that
            returns one.

    Raises:
        ValueError: for any other value.
    """
    if isinstance(granularity, str):
        return _named(granularity)
    if hasattr(granularity, "rows"):
        return lambda target: granularity  # type: ignore[return-value]
    if callable(granularity):
        return granularity
    raise TypeError(
        f"granularity should be 'weight', 'filter', 'n:m' or an object with rows and mask, got {granularity!r}"
    )


def _named(granularity: str) -> Callable[[Target], Units]:
    if granularity == "weight":
        return lambda target: Weights()
    if granularity == "filter":
        return _filters
    if own := re.fullmatch(r"(Weights|Slices|GroupedOutputs)\((?:\w+=)?(-?\d*)\)", granularity):
        kind: Callable[..., Units] = {"Weights": Weights, "Slices": Slices, "GroupedOutputs": GroupedOutputs}[own[1]]
        return lambda target: kind(*map(int, filter(None, [own[2]])))  # as scores that were saved call them
    if pattern := re.fullmatch(r"(\d+):(\d+)", granularity):
        n, m = int(pattern[1]), int(pattern[2])
        Blocks(n, m)  # checked at once, not at the first parameter
        return lambda target: Blocks(n, m, axis=1 - target.output_axis)
    near = difflib.get_close_matches(granularity, ("weight", "filter", *SHRINKABLE), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"unknown granularity {granularity!r}: expected 'weight', 'filter', 'channel', 'block' or 'n:m' such as "
        f"'2:4'{hint}"
    )


def _filters(target: Target) -> Units:
    """The output channels of a layer: of transposed convolutions along the second axis, group by group."""
    groups = getattr(target.owners[0][0], "groups", 1)
    return GroupedOutputs(groups) if target.output_axis == 1 and groups > 1 else Slices(target.output_axis)


def alive(units: Units, mask: Tensor) -> Tensor:
    """Which units an existing mask has left: those with at least one kept weight."""
    rows = units.rows(flags(mask))
    return rows.any(-1) if rows.shape[1] > 1 else rows[:, 0]

"""Tensors of which every rank holds a part: ``DTensor``, as ``fully_shard`` and tensor parallelism make them.

A part is a box: some range along each axis of the whole. Nothing here talks to other ranks but where it says so.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Box:
    """Where a part begins in its whole, and how far it reaches, along each axis."""

    begin: tuple[int, ...]
    size: tuple[int, ...]

    def of(self, whole: Tensor) -> Tensor:
        """The part of a whole tensor: a view."""
        return whole[tuple(slice(begin, begin + size) for begin, size in zip(self.begin, self.size, strict=True))]

    def inside(self, other: Box) -> Box:
        """The same counted from where another box begins, which it is inside of."""
        begin = (one - first for one, first in zip(self.begin, other.begin, strict=True))
        return Box((0,) * len(self.size) if 0 in self.size else tuple(begin), self.size)

    def moved(self, axis: int) -> Box:
        """With this axis last."""
        begin, size = ((*one[:axis], *one[axis + 1 :], one[axis]) for one in (self.begin, self.size))
        return Box(begin, size)


def is_sharded(value: object) -> bool:
    """Whether a tensor is a ``DTensor``."""
    return isinstance(value, Tensor) and hasattr(value, "device_mesh")


def local(value: Tensor) -> Tensor:
    """The part that is here, detached, in the memory it has; a plain tensor is all here."""
    if not is_sharded(value):
        return value.detach()
    part: Tensor = value.detach().to_local()  # type: ignore[attr-defined]
    return part.trigger_wait() if hasattr(part, "trigger_wait") else part  # one that is still on its way


def alike(part: Tensor, value: Tensor) -> Tensor:
    """This part as the ``DTensor`` that lies on the ranks as ``value`` does; where that is plain, the part."""
    if not is_sharded(value):
        return part
    from torch.distributed.tensor import DTensor

    spread: Any = value
    shape, stride = value.shape, value.stride()
    return DTensor.from_local(part, spread.device_mesh, spread.placements, run_check=False, shape=shape, stride=stride)


def box_of(value: Tensor) -> Box:
    """Where the part that is here lies in the whole.

    Raises:
        ValueError: for parts that are no boxes.
    """
    if not is_sharded(value):
        return Box((0,) * value.dim(), tuple(value.shape))
    spread: Any = value
    box, found = _box_by(tuple(value.shape), spread.device_mesh, spread.placements), tuple(local(value).shape)
    if any(placement.is_partial() for placement in spread.placements) or (box.size != found and 0 not in found):
        raise ValueError(
            f"a tensor of shape {tuple(value.shape)} lies on the ranks by {spread.placements}, and the part here, of "
            f"shape {found}, is no range along its axes: give it other placements, such as Shard(0)"
        )
    return box if 0 not in found else Box((0,) * value.dim(), found)


def _box_by(shape: tuple[int, ...], mesh: Any, placements: Sequence[Any]) -> Box:
    """Where the part on this rank lies: each axis of the mesh cuts what those before it have left, into equal pieces.

    The cut that ``fully_shard`` makes of shards is written before theirs, with a factor, and comes after it.
    """
    begin, size = [0] * len(shape), list(shape)
    cuts = [one for one in zip(placements, mesh.get_coordinate(), mesh.shape, strict=True) if hasattr(one[0], "dim")]
    for placement, rank, ranks in sorted(cuts, key=lambda one: hasattr(one[0], "split_factor")):
        axis, step = placement.dim, -(-size[placement.dim] // ranks)
        first = min(rank * step, size[axis])
        begin[axis], size[axis] = begin[axis] + first, min(step, size[axis] - first)
    return Box(tuple(begin), tuple(size))


def box_under(value: Tensor, placements: tuple[Any, ...]) -> Box:
    """Where the part that is here lies once the tensor lies by these placements."""
    box = _box_by(tuple(value.shape), value.device_mesh, placements)  # type: ignore[attr-defined]
    return box if 0 not in box.size else Box((0,) * value.dim(), box.size)


def replicated(value: Tensor, axes: Collection[int]) -> tuple[Any, ...]:
    """The placements of a sharded tensor with these axes in one piece on every rank.

    A cut that torch makes of another (``fully_shard`` over tensor parallelism) stays with that, or neither does.
    """
    from torch.distributed.tensor import Replicate

    given: tuple[Any, ...] = tuple(value.placements)  # type: ignore[attr-defined]
    strided = any(hasattr(placement, "split_factor") for placement in given)
    return tuple(
        Replicate() if strided or getattr(placement, "dim", None) in axes else placement for placement in given
    )


def laid(value: Tensor, placements: tuple[Any, ...] | None) -> Tensor:
    """The part that is here once a tensor lies by these placements, which sends it; None: as it lies."""
    if placements is None or not is_sharded(value):
        return local(value)
    return local(value.detach().redistribute(placements=placements))  # type: ignore[attr-defined]


def whole(value: Tensor) -> Tensor:
    """All of it, put together on every rank; a plain tensor as it is."""
    return value.full_tensor() if is_sharded(value) else value  # type: ignore[attr-defined]


class PutTogether(Mapping[str, Tensor]):
    """Tensors of which each is put together when it is read, by every rank: one at a time is there."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self._values = values

    def __getitem__(self, name: str) -> Tensor:
        value = self._values[name]
        if value.dtype is not torch.bool or not is_sharded(value):
            return whole(value.detach())
        return whole(alike(local(value).to(torch.uint8), value)) != 0  # numbers are what all backends send

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def as_shard_of(given: Tensor, value: Tensor) -> Tensor:
    """A tensor that every rank has, or one that lies on the ranks otherwise, as ``value`` lies.

    Of one that every rank has the part is copied; one that lies otherwise is sent between the ranks.
    """
    if not is_sharded(value):
        return whole(given)
    if not is_sharded(given):
        return alike(box_of(value).of(given.detach()).to(local(value).device).clone(), value)
    spread: Any = value
    if lie_alike(given, value):
        return given
    if given.device_mesh != spread.device_mesh:  # type: ignore[attr-defined]
        return as_shard_of(whole(given), value)
    moved: Tensor = given.redistribute(placements=spread.placements)  # type: ignore[attr-defined]
    return moved


def lie_alike(one: Tensor, other: Tensor) -> bool:
    """Whether each rank has the same parts of both; of plain tensors it has all."""
    if not (is_sharded(one) and is_sharded(other)):
        return is_sharded(one) == is_sharded(other)
    a: Any = one
    b: Any = other
    return bool(a.device_mesh == b.device_mesh and tuple(a.placements) == tuple(b.placements))


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` has wrapped this very module."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return kind is not None and isinstance(module, kind)


def register_shards(module: nn.Module) -> None:
    """Of a module that ``fully_shard`` has wrapped, and that a forward has left whole, the parameters are shards again.

    Any other module stays as it is. The next forward gathers them.
    """
    if is_fully_sharded(module):
        module.reshard()  # type: ignore[operator]


def shards_of(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of a model that are sharded."""
    found = []
    for module in model.modules():
        register_shards(module)
        found += [one for one in module._parameters.values() if one is not None and is_sharded(one)]
    return found

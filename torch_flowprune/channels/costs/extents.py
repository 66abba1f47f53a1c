"""Dimensions as functions of the units that stay, and products of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor

from torch_flowprune.inputs import on_host

Kept = Mapping[str, Tensor]
"""Which units of each group or branch stay: name -> (units,) bool."""


@dataclass(frozen=True, eq=False)
class Extent:
    """The positions of one dimension: ``fixed`` stay whatever goes; of the groups, how many each unit owns."""

    fixed: int
    owned: Mapping[str, Tensor]

    def size(self, kept: Kept) -> int:
        return self.fixed + sum(int(positions[kept[name]].sum()) for name, positions in self.owned.items())

    def to_dict(self) -> dict[str, Any]:
        """As plain values and tensors."""
        return {"fixed": self.fixed, "owned": dict(self.owned)}


@dataclass(frozen=True, eq=False)
class Term:
    """A product of dimensions: the elements of one parameter, or the operations of one operator."""

    name: str
    factor: int
    extents: tuple[Extent, ...]

    def count(self, sizes: Mapping[Extent, int]) -> int:
        return self.factor * prod(sizes[extent] for extent in self.extents)

    def to_dict(self) -> dict[str, Any]:
        """As plain values and tensors."""
        extents = [extent.to_dict() for extent in self.extents]
        return {"name": self.name, "factor": self.factor, "extents": extents}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Term:
        return cls(data["name"], data["factor"], tuple(Extent(**extent) for extent in data["extents"]))


@on_host()
def extent_sizes(extents: Iterable[Extent], kept: Kept) -> dict[Extent, int]:
    """Each extent's size where these units stay."""
    known = {name: units.cpu() for name, units in kept.items()}
    return {extent: extent.size(known) for extent in dict.fromkeys(extents)}

"""What a model costs as a function of the units that stay: parameters and operations, as values.

Each count is a product of dimensions: a parameter's own, or those that an operator runs over.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from torch_flowprune.inputs import on_host

Kept = Mapping[str, Tensor]


@dataclass(frozen=True)
class Size:
    """What a model costs.

    Attributes:
        parameters: how many it has.
        flops: of one forward pass on the example inputs, two for each multiply-add, as ``torch.utils.flop_counter``
            counts.
    """

    parameters: int
    flops: int


@dataclass(frozen=True, eq=False)
class Extent:
    """The positions of one dimension: ``fixed`` stay whatever goes; of the groups, how many each unit owns."""

    fixed: int
    owned: Mapping[str, Tensor]

    def size(self, kept: Kept) -> int:
        return self.fixed + sum(int(positions[kept[name]].sum()) for name, positions in self.owned.items())


@dataclass(frozen=True, eq=False)
class Term:
    """A product of dimensions: the elements of one parameter, or the operations of one operator."""

    name: str
    factor: int
    extents: tuple[Extent, ...]

    def count(self, sizes: Mapping[Extent, int]) -> int:
        return self.factor * prod(sizes[extent] for extent in self.extents)


@dataclass(frozen=True, eq=False)
class Costs:
    """Parameters and FLOPs of a model as functions of the units that stay.

    Attributes:
        parameters, flops: the terms whose sums they are.
        kept: which units of each group of the coupling the model's masks keep: group name -> (units,) bool.
    """

    parameters: tuple[Term, ...]
    flops: tuple[Term, ...]
    kept: Kept

    def of(self, kept: Kept) -> Size:
        """What ``shrink`` leaves where these units stay; of groups not named, those that the model's masks keep."""
        return Size(self._sum(self.parameters, kept), self._sum(self.flops, kept))

    def count(self, cost: str, kept: Kept) -> int:
        """One of the two, by name."""
        return self._sum(self._terms(cost), kept)

    @property
    def dense(self) -> Size:
        """What the model costs with all units."""
        return self.of(self._all)

    def total(self, cost: str) -> int:
        """One of the two with all units."""
        return self.count(cost, self._all)

    @property
    def _all(self) -> Kept:
        return {name: torch.ones_like(kept) for name, kept in self.kept.items()}

    def largest(self, cost: str, kept: Kept, most: int = 3) -> list[tuple[str, int]]:
        """The names and counts of the largest terms."""
        sizes = self._sizes(self._terms(cost), kept)
        counts = [(term.name, term.count(sizes)) for term in self._terms(cost)]
        return sorted(counts, key=lambda pair: -pair[1])[:most]

    def _terms(self, cost: str) -> tuple[Term, ...]:
        return self.parameters if cost == "parameters" else self.flops

    def _sum(self, terms: Iterable[Term], kept: Kept) -> int:
        terms = tuple(terms)
        sizes = self._sizes(terms, kept)
        return sum(term.count(sizes) for term in terms)

    @on_host()
    def _sizes(self, terms: Iterable[Term], kept: Kept) -> dict[Extent, int]:
        known = {name: units.cpu() for name, units in {**self.kept, **kept}.items()}
        return {
            extent: extent.size(known) for extent in dict.fromkeys(extent for term in terms for extent in term.extents)
        }

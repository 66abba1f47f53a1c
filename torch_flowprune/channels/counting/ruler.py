"""Dimensions of a graph, measured in units of a coupling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from torch_flowprune.channels.costs import Extent, Term
from torch_flowprune.channels.groups import Coupling
from torch_flowprune.channels.tracing import Reading

Dims = Sequence[Tensor]


@dataclass(eq=False)
class Ruler:
    """Measures dimensions of a graph in units of a coupling."""

    reading: Reading
    coupling: Coupling
    extents: dict[bytes, Extent] = field(default_factory=dict)
    counts: dict[bytes, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Class of labels -> number of its group, number of its unit; -1 where nothing can go."""
        self.group, self.unit = (torch.full((self.reading.axes.count,), -1) for _ in range(2))
        starts = {(block.name, block.axis): block.start for block in self.reading.axes.blocks}
        for number, group in enumerate(self.coupling.groups):
            first = group.slices[0]
            roots = self.reading.solution.root[starts[first.parameter, first.axis] + first.index[:, 0]]
            self.group[roots], self.unit[roots] = number, torch.arange(group.size)

    def term(self, name: str, dims: Dims, factor: int = 1) -> Term:
        extents = [self.extent(labels) for labels in dims]
        return Term(
            name,
            factor * prod(one.fixed for one in extents if not one.owned),
            tuple(one for one in extents if one.owned),
        )

    def extent(self, labels: Tensor) -> Extent:
        """Equal dimensions share one, so that it is measured once."""
        roots = self.reading.solution.root[labels]
        key = roots.numpy().tobytes()
        if key not in self.extents:
            self.extents[key] = self._measured(roots)
        return self.extents[key]

    def _measured(self, roots: Tensor) -> Extent:
        group, unit = self.group[roots], self.unit[roots]
        owned = {}
        for number in group[group >= 0].unique().tolist():
            owner = self.coupling.groups[number]
            each = unit[group == number].bincount(minlength=owner.size)
            owned[owner.name] = self.counts.setdefault(each.numpy().tobytes(), each)
        return Extent(int((group < 0).sum()), owned)

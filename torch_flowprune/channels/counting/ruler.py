"""Dimensions of a graph, measured in units of a coupling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor
from torch.fx import Node

from torch_flowprune.channels.branches import read_branches
from torch_flowprune.channels.costs import Extent, Term
from torch_flowprune.channels.groups import Coupling
from torch_flowprune.channels.tracing import Reading

Dims = Sequence[Tensor]


@dataclass(eq=False)
class Ruler:
    """Measures dimensions of a graph in units of a coupling.

    Attributes:
        branch_of: what runs for a branch alone, and the names of the parameters that only that reads: those branches.
    """

    reading: Reading
    coupling: Coupling
    extents: dict[bytes, Extent] = field(default_factory=dict)
    counts: dict[bytes, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Class of labels -> number of its group, number of its unit; -1 where nothing can go."""
        self.branch_of: Mapping[Node | str, Sequence[Extent]] = self._branches()
        self.group, self.unit = (torch.full((self.reading.axes.count,), -1) for _ in range(2))
        starts = {(block.name, block.axis): block.start for block in self.reading.axes.blocks}
        for number, group in enumerate(self.coupling.groups):
            first = group.slices[0]
            roots = self.reading.solution.root[starts[first.parameter, first.axis] + first.index[:, 0]]
            self.group[roots], self.unit[roots] = number, torch.arange(group.size)

    def term(self, name: str, dims: Dims, factor: int = 1, of: Node | str = "") -> Term:
        """What the dimensions make in all, for as long as the branch stays that it is ``of``."""
        extents = [self.extent(labels) for labels in dims]
        return Term(
            name,
            factor * prod(one.fixed for one in extents if not one.owned),
            (*(one for one in extents if one.owned), *self.within(of)),
        )

    def within(self, of: Node | str) -> tuple[Extent, ...]:
        """A dimension of one position, which is gone with the branch."""
        return tuple(self.branch_of.get(of, ()))

    def _branches(self) -> dict[Node | str, list[Extent]]:
        known, inside = read_branches(self.reading), dict[Node | str, list[Extent]]()
        for branch in self.coupling.branches:
            if branch.name in known:
                extent = Extent(0, {branch.name: torch.ones(1, dtype=torch.long)})
                parts: list[Node | str] = [*known[branch.name][1].nodes, *branch.parameters]
                for of in parts:
                    inside.setdefault(of, []).append(extent)
        return inside

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

"""Groups of channels that keep equal shares: which they are, in which steps, and what is held whole."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import gcd

from torch import nn

from torch_flowprune.channels.construction import Shapes, sites_of
from torch_flowprune.channels.groups import Coupling
from torch_flowprune.channels.slices import Group


@dataclass(frozen=True)
class Dial:
    """Groups that are made smaller together.

    Attributes:
        sizes: how many units each has, by name.
        steps: in how many equal steps all of them lose all units.
    """

    sizes: Mapping[str, int]
    steps: int

    def kept(self, step: int) -> dict[str, int]:
        """How many units each keeps, so many steps from none."""
        return {name: size * step // self.steps for name, size in self.sizes.items()}

    @property
    def unit(self) -> int:
        """How many units one step is, in all groups."""
        return sum(self.sizes.values()) // self.steps


@dataclass(frozen=True)
class UniformSizes:
    """What may become smaller so that the model stays one of its class.

    Attributes:
        dials: what goes together.
        held: the groups that stay whole, and why.
        fits: whether the class can be built so, of the units that each group keeps.
    """

    dials: tuple[Dial, ...]
    held: Mapping[str, str]
    fits: Callable[[Mapping[str, int]], bool]


def tied_groups(model: nn.Module, coupling: Coupling) -> list[tuple[Group, ...]]:
    """Groups of one size that the same place in modules of one class makes, however often that is repeated."""
    sites, found = sites_of(model), dict[object, list[int]]()
    part_of = list(range(len(coupling.groups)))
    for number, group in enumerate(coupling.groups):
        for one in group.slices:
            if one.role == "producer" and one.parameter in sites:
                key = (sites[one.parameter], one.axis, group.size, one.index.shape[1])
                found.setdefault(key, []).append(number)
    for first, *others in found.values():
        for other in others:
            old, new = part_of[other], part_of[first]
            part_of = [new if one == old else one for one in part_of]
    tied: dict[int, list[Group]] = {}
    for group, number in zip(coupling.groups, part_of, strict=True):
        tied.setdefault(number, []).append(group)
    return [tuple(groups) for groups in tied.values()]


def dial_of(groups: Collection[Group], quantum: Mapping[str, int] | None = None) -> Dial:
    """All groups in the smallest equal steps that are whole units of each; no smaller than ``quantum`` units."""
    sizes = {group.name: group.size for group in groups}
    steps = gcd(*sizes.values())
    for name, units in (quantum or {}).items():
        steps = min(steps, sizes[name] // units)
    return Dial(sizes, steps)


def shapes_after(
    dense: Shapes, aliases: Mapping[str, Sequence[str]], coupling: Coupling, kept: Mapping[str, int]
) -> dict[str, tuple[int, ...]]:
    """The shapes of a model of which each group keeps so many units; all of them, where it is not named."""
    made = {name: list(shape) for name, shape in dense.items()}
    for group in coupling.groups:
        gone = group.size - kept.get(group.name, group.size)
        for one in group.slices if gone else ():
            for name in aliases.get(one.parameter, (one.parameter,)):
                if name in made:
                    made[name][one.axis] -= gone * one.index.shape[1]
    return {name: tuple(shape) for name, shape in made.items()}

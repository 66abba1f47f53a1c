"""A coupling as a value: groups of parameter slices, one unit per channel, that have to be kept or removed together.

:func:`~torch_flowprune.couple` reads one off a model; any other is written by hand. It can be printed, drawn, stored as
JSON, scored by its ``rows``, and turned into ``masks``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from torch_flowprune.channels.costs import Costs
from torch_flowprune.channels.slices import ROLES, Group, Slice
from torch_flowprune.inputs import ComparedByValue
from torch_flowprune.tables import InNotebooks, Table


@dataclass(frozen=True)
class Branch:
    """A residual branch, the f of x + f(x): without it, x is passed on unchanged.

    Attributes:
        name: the name of the module that holds its layers.
        parameters: the parameters that only this branch reads.
        masked: those of them that are masked to remove it: with zeros there, the branch adds exactly zero, and nothing
            is divided by zero.
        operators: the names of the operators that it runs, sorted; branches that do the same work have the same.

    See Also:
        :func:`~torch_flowprune.couple`: finds them; ``granularity="block"`` prunes them.
    """

    name: str
    parameters: tuple[str, ...]
    masked: tuple[str, ...]
    operators: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", tuple(self.parameters))
        object.__setattr__(self, "masked", tuple(self.masked))
        object.__setattr__(self, "operators", tuple(self.operators))
        if not self.masked or not set(self.masked) <= set(self.parameters):
            raise ValueError(
                f"branch {self.name!r} should mask one of its parameters at least, and none besides: got masked="
                f"{self.masked!r}, parameters={self.parameters!r}"
            )

    def is_alive(self, masks: Mapping[str, Tensor]) -> bool:
        """Whether these masks, by parameter name, leave anything of the branch."""
        return any(name not in masks or bool(masks[name].any()) for name in self.masked)


@dataclass(frozen=True)
class Frozen:
    """Positions of one axis of a parameter that cannot be removed, and why."""

    parameter: str
    axis: int
    positions: int
    role: str
    reason: str


@dataclass(frozen=True, eq=False)
class Coupling(ComparedByValue, InNotebooks):
    """What can be removed from a model, and what cannot: a plain value to print, draw, store, or write by hand.

    Attributes:
        groups: the removable units.
        frozen: what cannot be removed, with the reason.
        unknown: operators without a rule, and how many of each the graph has.
        costs: the model's cost as a function of the kept units, if the coupling was read from a model.
        branches: the residual branches, each a unit of ``granularity="block"``.

    See Also:
        :func:`~torch_flowprune.couple`: reads it from a model.

    >>> import torch, torch_flowprune as fp
    >>> rows = fp.Slice("0.weight", 0, torch.arange(4), "producer")
    >>> columns = fp.Slice("2.weight", 1, torch.arange(4), "consumer")
    >>> by_hand = fp.Coupling((fp.Group("hidden", (rows, columns)),))
    >>> by_hand["hidden"].size
    4
    """

    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...] = ()
    unknown: Mapping[str, int] = field(default_factory=dict)
    costs: Costs | None = None
    branches: tuple[Branch, ...] = ()

    def __post_init__(self) -> None:
        counts = Counter([*(group.name for group in self.groups), *(branch.name for branch in self.branches)])
        if twice := {name for name, count in counts.items() if count > 1}:
            raise ValueError(
                f"several groups or branches are called {min(twice)!r}: expected a name of its own for each"
            )
        owners = Counter(name for branch in self.branches for name in branch.parameters)
        if shared := {name for name, count in owners.items() if count > 1}:
            raise ValueError(f"{min(shared)!r} is in several branches: expected each parameter in one at most")
        self._check_disjoint()

    def _check_disjoint(self) -> None:
        held: dict[tuple[str, int], list[tuple[str, Tensor]]] = {}
        for group in self.groups:
            for part in group.slices:
                held.setdefault((part.parameter, part.axis), []).append((group.name, part.index.reshape(-1)))
        for (parameter, axis), parts in held.items():
            ordered = torch.cat([index for _, index in parts]).sort().values
            if len(double := ordered[1:][ordered[1:] == ordered[:-1]]):
                owners = dict.fromkeys(name for name, index in parts if bool((index == double[0]).any()))
                where = (
                    f"twice in group {next(iter(owners))!r}"
                    if len(owners) == 1
                    else f"in groups {' and '.join(map(repr, owners))}"
                )
                raise ValueError(
                    f"position {int(double[0])} of axis {axis} of {parameter!r} is {where}: a position belongs to "
                    "one unit"
                )

    def check_fits(self, tensors: Mapping[str, Tensor], roles: Collection[str] = ROLES) -> None:
        """Raise an error if a slice does not fit these tensors.

        Raises:
            ValueError: for an unknown name, axis or position.
        """
        for group in self.groups:
            for part in group.slices:
                if part.role in roles:
                    part.check_fits(tensors, group.name)
        for branch in self.branches:
            if unknown := [name for name in branch.parameters if name not in tensors]:
                raise ValueError(f"branch {branch.name!r} has {unknown[0]!r}, and the model has no such parameter")

    def __getitem__(self, name: str) -> Group:
        if name in self._by_name:
            return self._by_name[name]
        raise KeyError(f"no group {name!r}; there are {', '.join(g.name for g in self.groups) or 'none'}")

    @cached_property
    def _by_name(self) -> dict[str, Group]:
        return {group.name: group for group in self.groups}

    def share(self) -> float:
        """The fraction of the output channels of linear layers and convolutions that can be removed."""
        free = sum(s.index.numel() for g in self.groups for s in g.slices if s.role == "producer")
        held = sum(f.positions for f in self.frozen if f.role == "producer")
        return free / (free + held) if free + held else 0.0

    def __str__(self) -> str:
        lines = []
        for g in self.groups:
            lines.append(f"{g.name}: {g.size} units")
            lines += [f"    {s.role:10}{s.parameter} axis {s.axis}{_positions_each(s)}" for s in g.slices]
        lines += [f"{branch.name}: a branch of {len(branch.parameters)} parameters" for branch in self.branches]
        lines += ["not removable:"] if self.frozen else []
        lines += [f"    {f.parameter} axis {f.axis}, {f.positions} positions: {f.reason}" for f in self.frozen]
        lines += (
            [f"operators without a rule: {', '.join(f'{k} ({n})' for k, n in self.unknown.items())}"]
            if self.unknown
            else []
        )
        return "\n".join(lines)

    def _summary(self) -> str:
        some, branches = len(self.groups), len(self.branches)
        channels = f"{some} group{'s' * (some != 1)}; {self.share():.0%} of the output channels can be removed"
        return f"{channels}; {branches} residual branch{'es' * (branches != 1)}" if branches else channels

    def _cells(self) -> Table:
        roles = ("producer", "affine", "consumer")
        named = [[", ".join(s.parameter for s in g.slices if s.role == role) for role in roles] for g in self.groups]
        rows = [(g.name, *names, f"{g.size:,}") for g, names in zip(self.groups, named, strict=True)]
        return Table(("group", "producers", "scales and shifts", "consumers", "units"), rows, names=4)

    def to_dot(self) -> str:
        """The groups as a Graphviz graph: a box per group, producers left, consumers right."""
        lines = ["digraph coupling {", "  rankdir=LR; node [shape=box, fontsize=10];"]
        for i, g in enumerate(self.groups):
            lines.append(f'  g{i} [label="{g.name}\\n{g.size} units", shape=ellipse];')
            for j, s in enumerate(g.slices):
                lines.append(f'  g{i}s{j} [label="{s.parameter}\\naxis {s.axis}{_positions_each(s)}"];')
                ends = (f"g{i}", f"g{i}s{j}") if s.role == "consumer" else (f"g{i}s{j}", f"g{i}")
                lines.append(f'  {ends[0]} -> {ends[1]} [label="{s.role}"];')
        return "\n".join([*lines, "}"])

    def to_dict(self) -> dict[str, Any]:
        """The coupling as plain values for JSON."""
        groups = [
            {**vars(g), "slices": [{**vars(s), "index": s.index.tolist()} for s in g.slices]} for g in self.groups
        ]
        frozen, branches = ([dict(vars(one)) for one in some] for some in (self.frozen, self.branches))
        return {"groups": groups, "frozen": frozen, "unknown": dict(self.unknown), "branches": branches}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Coupling:
        """The coupling that :meth:`to_dict` wrote; costs are not written, so it has none."""
        groups = tuple(Group(**{**g, "slices": tuple(Slice(**s) for s in g["slices"])}) for g in data["groups"])
        frozen = tuple(Frozen(**one) for one in data.get("frozen", ()))
        branches = tuple(Branch(**one) for one in data.get("branches", ()))
        return cls(groups, frozen, dict(data.get("unknown", {})), branches=branches)


def _positions_each(s: Slice) -> str:
    return f", {s.index.shape[1]} positions each" if s.index.shape[1] > 1 else ""

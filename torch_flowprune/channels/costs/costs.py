"""What a model costs as a function of the units that stay: parameters, operations, memory, and what it runs, as values.

Each count is a product of dimensions: a parameter's own, or those that an operator runs over.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from torch_flowprune.channels.costs.extents import Extent, Kept, Term, extent_sizes
from torch_flowprune.channels.costs.operators import Call, Holding, Operator, most_held

COUNTED = ("parameters", "flops")
"""What is counted by terms alone."""


@dataclass(frozen=True)
class Size:
    """The size of a model.

    Attributes:
        parameters: the number of its parameters.
        flops: FLOPs of one forward pass on the example inputs, two for each multiply-add, as
            ``torch.utils.flop_counter`` counts.

    See Also:
        :class:`~torch_flowprune.Report`: has it before and after pruning, as ``dense`` and ``left``.

    >>> import torch, torch_flowprune as fp
    >>> model, x = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)), torch.ones(1, 4)
    >>> report = fp.global_prune(model, sparsity=0.5, granularity="channel", example_inputs=x)
    >>> report.dense, report.left
    (Size(parameters=58, flops=96), Size(parameters=30, flops=48))
    """

    parameters: int
    flops: int


@dataclass(frozen=True, eq=False)
class Costs:
    """Parameters, FLOPs and memory of a model as functions of the units that stay, and the operators it then runs.

    Attributes:
        parameters, flops: the terms whose sums they are.
        kept: which units of each group and branch of the coupling the model's masks keep: name -> (units,) bool.
        operators: what one forward pass on the example inputs runs, in order; without views, which take no time.
        holdings: the tensors that it holds meanwhile.
        device: that the model is on.
    """

    parameters: tuple[Term, ...]
    flops: tuple[Term, ...]
    kept: Kept
    operators: tuple[Operator, ...] = ()
    holdings: tuple[Holding, ...] = ()
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def tells(self, cost: str) -> bool:
        """Whether it says what this is: one that an earlier version saved has the counts alone."""
        return cost in COUNTED or bool(self.operators if cost == "latency" else self.holdings)

    def of(self, kept: Kept) -> Size:
        """What ``shrink`` leaves where these units stay; of groups not named, those that the model's masks keep."""
        return Size(self._sum(self.parameters, kept), self._sum(self.flops, kept))

    def count(self, cost: str, kept: Kept) -> int:
        """One of them, by name."""
        if cost == "memory":
            return most_held(self.holdings, self._sizes(self._held, kept))
        return self._sum(self._terms(cost), kept)

    def calls(self, kept: Kept) -> list[Call]:
        """What runs where these units stay, with the sizes that it then has."""
        return [call for _, call in self.named_calls(kept)]

    def named_calls(self, kept: Kept) -> list[tuple[str, Call]]:
        """The same, each with the name of its module."""
        sizes = self._sizes(self._run, kept)
        return [(operator.name, operator.at(sizes)) for operator in self.operators if operator.runs(sizes)]

    @property
    def dense(self) -> Size:
        """What the model costs with all units."""
        return self.of(self.all)

    @property
    def all(self) -> Kept:
        """All units of all groups."""
        return {name: torch.ones_like(kept) for name, kept in self.kept.items()}

    def to_dict(self) -> dict[str, Any]:
        """The counts, what the model runs and what it holds, as plain values and tensors."""
        counts = {cost: [term.to_dict() for term in self._terms(cost)] for cost in COUNTED}
        numbers: dict[Extent, int] = {}
        parts: dict[str, tuple[Operator, ...] | tuple[Holding, ...]] = {
            "operators": self.operators,
            "holdings": self.holdings,
        }
        run = {word: [one.to_dict(numbers) for one in made] for word, made in parts.items()}
        extents = [extent.to_dict() for extent in numbers]  # in the order of their numbers
        return {**counts, **run, "extents": extents, "kept": dict(self.kept)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Costs:
        """Of :meth:`to_dict`; one of an earlier version has the counts alone."""
        parameters, flops = (tuple(Term.from_dict(term) for term in data[cost]) for cost in COUNTED)
        extents = [Extent(**extent) for extent in data.get("extents", ())]
        operators = tuple(Operator.from_dict(one, extents) for one in data.get("operators", ()))
        holdings = tuple(Holding.from_dict(one, extents) for one in data.get("holdings", ()))
        return cls(parameters, flops, data["kept"], operators, holdings)

    def largest(self, cost: str, kept: Kept, most: int = 3) -> list[tuple[str, int]]:
        """The names and counts of the largest terms."""
        terms = self._terms(cost)
        sizes = self._sizes(_extents_of(terms), kept)
        return sorted(((term.name, term.count(sizes)) for term in terms), key=lambda pair: -pair[1])[:most]

    def _terms(self, cost: str) -> tuple[Term, ...]:
        return self.flops if cost == "flops" else self.parameters

    def _sum(self, terms: tuple[Term, ...], kept: Kept) -> int:
        sizes = self._sizes(_extents_of(terms), kept)
        return sum(term.count(sizes) for term in terms)

    def _sizes(self, extents: Iterable[Extent], kept: Kept) -> dict[Extent, int]:
        return extent_sizes(extents, {**self.kept, **kept})

    @cached_property
    def _held(self) -> tuple[Extent, ...]:
        held = (extent for one in self.holdings for extent in (*one.operand.extents, *one.within))
        return tuple(dict.fromkeys(held))

    @cached_property
    def _run(self) -> tuple[Extent, ...]:
        return tuple(dict.fromkeys(extent for operator in self.operators for extent in operator.extents()))


def _extents_of(terms: Iterable[Term]) -> Iterable[Extent]:
    return (extent for term in terms for extent in term.extents)

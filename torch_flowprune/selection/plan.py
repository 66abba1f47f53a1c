"""A plan: which layers are ranked together, and how many of their units are gone after each round."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from torch_flowprune.channels import Kept
from torch_flowprune.scoring import Blocks
from torch_flowprune.selection.budget import Budget
from torch_flowprune.selection.goal import share_of
from torch_flowprune.selection.rules import Bounds, Comparable, Levels


@dataclass(frozen=True)
class Pool:
    """Layers ranked together, and how many of their units are gone in all after a round."""

    names: tuple[str, ...]
    gone: int


Pools: TypeAlias = Sequence[Pool]
Split: TypeAlias = Callable[[int, Mapping[str, int]], Pools]
"""From a number of steps, and the units left by layer, to pools: the more steps, the more goes."""


@dataclass(frozen=True)
class Allowance:
    """A target in a budget.

    Attributes:
        budget: what units cost.
        gone_after: how much of its total is gone after each round.
    """

    budget: Budget
    gone_after: tuple[int, ...]

    def after(self, round_: int) -> int:
        """What the model may cost after a round."""
        return self.budget.total - self.gone_after[round_]

    def spent(self, kept: Kept) -> tuple[str, float, float, float]:
        """The cost's name, what it is with all units, what is allowed in the end, and what it is with these."""
        budget, amount = self.budget, self.budget.meter.amount
        return budget.meter.name, amount(budget.total), amount(self.after(-1)), amount(budget.left(kept))


@dataclass(frozen=True)
class Spending:
    """Targets in what units cost, all of which are met.

    Attributes:
        allowances: the targets; the first is the one that a share is of.
        split: the pools after so many steps.
        steps: how many there are, with these units left.
    """

    allowances: tuple[Allowance, ...]
    split: Split
    steps: Callable[[Mapping[str, int]], int]


@dataclass(frozen=True)
class Plan:
    """What goes from where.

    Attributes:
        why: what shares sparsity out, in a word for the report.
        bounds: what each layer keeps.
        rounds: the pools after each round; empty where ``spending`` decides.
        spending: a target in a budget, or None.
        comparable: what scores go through before they are ranked, or None.
        blocks: the n:m pattern, or None.
        by_row: whether each output gives up equally many.
        multiples: what the number of units that a layer keeps is a multiple of; empty where it may be any.
        levels: the widths that layers may have together, where they are to be equal.
    """

    why: str
    bounds: Bounds
    rounds: tuple[Pools, ...] = ()
    spending: Spending | None = None
    comparable: Comparable | None = None
    blocks: Blocks | None = None
    by_row: bool = False
    multiples: Mapping[str, int] = field(default_factory=dict)
    levels: Levels | None = None

    @property
    def asked(self) -> int | None:
        """How many units should be gone after the last round, where that many may not be had exactly."""
        if not self.rounds or (self.levels is None and not self.multiples):
            return None
        return sum(pool.gone for pool in self.rounds[-1])

    @property
    def sparsity(self) -> float:
        """After the last round, of all units; or of what the first target counts."""
        if self.spending is not None:
            first = self.spending.allowances[0]
            return share_of(first.gone_after[-1], first.budget.total)
        return sum(pool.gone for pool in self.rounds[-1]) / sum(self.bounds.units.values())

"""A plan: which layers are ranked together, and how many of their units are gone after each round."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch_flowprune.scoring import Blocks
from torch_flowprune.selection.bounds import Bounds
from torch_flowprune.selection.budget import Budget
from torch_flowprune.selection.comparable_scores import Comparable


@dataclass(frozen=True)
class Pool:
    """Layers ranked together, and how many of their units are gone in all after a round."""

    names: tuple[str, ...]
    gone: int


Pools: TypeAlias = Sequence[Pool]
Split: TypeAlias = Callable[[int, Mapping[str, int]], Pools]
"""From a number of steps, and the units left by layer, to pools: the more steps, the more goes."""


@dataclass(frozen=True)
class Spending:
    """A target in a budget.

    Attributes:
        budget: what units cost.
        gone_after: how much of its total is gone after each round.
        split: the pools after so many steps.
        steps: how many there are, with these units left.
    """

    budget: Budget
    gone_after: tuple[int, ...]
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
        round_to: what the number of units that a layer keeps is a multiple of.
    """

    why: str
    bounds: Bounds
    rounds: tuple[Pools, ...] = ()
    spending: Spending | None = None
    comparable: Comparable | None = None
    blocks: Blocks | None = None
    by_row: bool = False
    round_to: int = 1

    @property
    def sparsity(self) -> float:
        """After the last round, of all units; of a plan that has its pools."""
        return sum(pool.gone for pool in self.rounds[-1]) / sum(self.bounds.units.values())

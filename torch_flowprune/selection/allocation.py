"""How sparsity is shared out over the layers: which are ranked together, how much goes from each, what each keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import ceil

from typing_extensions import TypedDict

from torch_flowprune.scoring import Blocks, Candidates, lefts
from torch_flowprune.selection.budget import Budget, living_units
from torch_flowprune.selection.goal import Goal, rounded_up
from torch_flowprune.selection.sampled_bracket import numbers


class AllocationOptions(TypedDict, total=False):
    """How sparsity is shared out; :func:`~torch_flowprune.global_prune` has each."""

    scope: str
    min_keep: float | None
    cost: str


@dataclass(frozen=True)
class Pool:
    """Layers ranked together, and how much is gone after each round: of their units, or of a budget."""

    names: tuple[str, ...]
    gone_after: tuple[int, ...]
    budget: Budget | None = None


@dataclass(frozen=True)
class Allocation:
    """The words of :class:`AllocationOptions` as one value.

    Raises:
        ValueError: for a word out of range.
    """

    scope: str = "global"
    min_keep: float | None = None
    cost: str = "units"

    def __post_init__(self) -> None:
        if self.scope not in ("global", "layer"):
            raise ValueError(
                "scope should be 'global' (one ranking over all layers) or 'layer' (each to the same sparsity), got "
                f"{self.scope!r}"
            )
        least = self.min_keep
        known = isinstance(least, (int, float)) and not isinstance(least, bool) and least >= 0
        if least is not None and (not known or (isinstance(least, float) and least > 1)):
            raise ValueError(
                "min_keep should be a number of units a layer keeps (int) or a fraction of the layer (float from 0 to "
                f"1), got {least!r}"
            )

    def floors(self, found: Candidates) -> dict[str, int] | None:
        """How many units each layer keeps at least: with a cost one, for ``shrink`` to leave something of it."""
        if self.min_keep is None and self.cost == "units":
            return None
        if self.min_keep is not None and _blocks(found) is not None:
            raise ValueError(
                f"min_keep={self.min_keep} has no part in n:m blocks, which keep n of every m: leave it out"
            )
        least = self.min_keep or 0
        counts = {name: len(candidate) for name, candidate in found.items()}
        # 0.7 of 10 is 7.000000000000001 in floating point, and 7 all the same.
        kept = {
            name: min(least, count) if isinstance(least, int) else ceil(round(least * count, 6))
            for name, count in counts.items()
        }
        return kept if self.cost == "units" else {name: max(1, count) for name, count in kept.items()}

    def pools(self, found: Candidates, goal: Goal, least: Mapping[str, int] | None = None) -> list[Pool]:
        """Pruning each layer to one sparsity is global pruning of one layer at a time."""
        if (budget := Budget.of(found, self.cost, least)) is not None:
            if self.scope != "global":
                raise ValueError(
                    f"cost={self.cost!r} is of the whole model, which scope={self.scope!r} has no part in: leave "
                    "scope= out"
                )
            return [_within(budget, found, goal)]
        counts = {name: len(candidate) for name, candidate in found.items()}
        left = dict(zip(found, numbers(lefts(found)), strict=True))
        groups = [tuple(found)] if self.scope == "global" else [(name,) for name in found]
        if (blocks := _blocks(found)) is not None:
            goal.check_pattern(blocks)
            return [
                Pool(group, (sum(counts[name] for name in group) * (blocks.m - blocks.n) // blocks.m,))
                for group in groups
            ]
        return [_pool(group, counts, left, goal) for group in groups]


def gone_share(found: Candidates, cost: str = "units") -> float:
    """The share that is gone already, of what ``cost`` counts."""
    if (budget := Budget.of(found, cost)) is not None:
        return 1 - budget.left(living_units(found)) / budget.total
    total = sum(map(len, found.values()))
    return 1 - sum(numbers(lefts(found))) / total if total else 0.0


def _within(budget: Budget, found: Candidates, goal: Goal) -> Pool:
    """All layers, down to a share of what the model costs."""
    units, total = living_units(found), budget.total
    gone = total - budget.left(units)
    wanted = goal.gone(total, total - gone, partial(rounded_up, total=total))
    if wanted < gone and budget.is_overdrawn(units, total - wanted):
        raise goal.too_low(f"the model is already at sparsity {gone / total:.4g} of its {budget.cost}")
    budget.check_reachable(units, total - wanted)
    return Pool(tuple(found), goal.path(total, gone, max(wanted, gone)), budget)


def _blocks(found: Candidates) -> Blocks | None:
    """The n:m pattern, where there is one.

    Of all or of none, for units of another kind are ranked and blocks are not.
    """
    patterns = [candidate.blocks for candidate in found.values()]
    if None in patterns and any(patterns):
        raise ValueError(
            "granularity= gives n:m blocks for some parameters and other units for the rest: prune them in two "
            "calls, with include="
        )
    return next(iter(patterns), None)


def _pool(names: tuple[str, ...], counts: dict[str, int], lefts: dict[str, int], goal: Goal) -> Pool:
    total, left = sum(counts[name] for name in names), sum(lefts[name] for name in names)
    wanted = goal.gone(total, left)
    if wanted < total - left:
        where = "the model" if len(names) > 1 else repr(names[0])
        raise goal.too_low(f"{where} is already at sparsity {(total - left) / total:.4g}")
    return Pool(names, goal.path(total, total - left, wanted))

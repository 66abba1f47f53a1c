"""How sparsity is shared out over the layers: which are ranked together, how much goes from each, what each keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from typing_extensions import TypedDict

from torch_flowprune.channels import LatencyTable
from torch_flowprune.inputs import whole_number
from torch_flowprune.scoring import Blocks, Candidates, lefts
from torch_flowprune.selection.allowances import AtMost, allowances, checked_amounts, counted_range
from torch_flowprune.selection.budget import Budget, living_units
from torch_flowprune.selection.goal import Goal
from torch_flowprune.selection.layers import Layers, check_rule_of_blocks
from torch_flowprune.selection.meters import COSTS
from torch_flowprune.selection.plan import Plan, Pool, Pools, Spending
from torch_flowprune.selection.rules import (
    NORMALIZERS,
    SHARE_RULES,
    Levels,
    PerLayer,
    ShareRule,
    bounds_of,
    by_layer,
    check_number,
    multiples_of,
)

SharedOut: TypeAlias = str | ShareRule | Mapping[str, float]

OF_WEIGHTS_ALONE = ("magnitude", "l2", "l1")
"""Measures of weights without data: how large they are says more of the layer than of the loss."""
_RANKED = ("global", "lamp", "isomorphic", "row")


class AllocationOptions(TypedDict, total=False):
    """How sparsity is shared out; :func:`~torch_flowprune.global_prune` has each."""

    allocation: SharedOut | None
    scope: str
    normalize: str | None
    min_keep: PerLayer | None
    max_sparsity: PerLayer | None
    round_to: int
    cost: str | LatencyTable
    at_most: AtMost | None
    uniform: bool


@dataclass(frozen=True)
class Allocation:
    """The words of :class:`AllocationOptions` as one value.

    Raises:
        ValueError, TypeError: for a word out of range.
    """

    allocation: SharedOut | None = None
    scope: str = "global"
    normalize: str | None = "default"
    min_keep: PerLayer | None = None
    max_sparsity: PerLayer | None = None
    round_to: int = 1
    cost: str | LatencyTable = "units"
    at_most: AtMost | None = None
    uniform: bool = False

    def __post_init__(self) -> None:
        self._check_cost()
        if self.scope not in ("global", "layer", "row"):
            raise ValueError(
                "scope should be 'global' (one ranking over all layers), 'layer' (each to the same sparsity) or 'row' "
                f"(each output to the same sparsity), got {self.scope!r}"
            )
        if self.allocation is not None and self.scope != "global":
            raise ValueError(f"scope={self.scope!r} is short for allocation={self.scope!r}: give one of the two")
        self._check_rule()
        for word, value in (("min_keep", self.min_keep), ("max_sparsity", self.max_sparsity)):
            if value is not None and not isinstance(value, Mapping):
                object.__setattr__(self, word, check_number(word, value))
        if self.normalize not in (None, "default", *NORMALIZERS):
            known = ", ".join(map(repr, NORMALIZERS))
            raise ValueError(f"normalize should be {known}, 'default' or None, got {self.normalize!r}")
        object.__setattr__(self, "round_to", whole_number(self.round_to, "round_to", ", such as 8"))

    def _check_cost(self) -> None:
        """Of a latency one table, for all rounds."""
        if not isinstance(self.cost, LatencyTable) and self.cost not in COSTS:
            raise ValueError(f"cost should be one of {', '.join(COSTS)}, or a LatencyTable, got {self.cost!r}")
        if self.at_most is not None:
            object.__setattr__(self, "at_most", checked_amounts(self.at_most))
        if self.cost == "latency":
            tables = [one for one in self.at_most or () if isinstance(one, LatencyTable)]
            object.__setattr__(self, "cost", next(iter(tables), None) or LatencyTable())

    def _check_rule(self) -> None:
        rule = self.rule
        known = [*_RANKED, *SHARE_RULES]
        if isinstance(rule, str) and rule not in known:
            raise ValueError(
                f"allocation should be one of {', '.join(known)}, a mapping of name globs to sparsities, or a function "
                f"of (layers, sparsity), got {rule!r}"
            )
        if not isinstance(rule, (str, Mapping)) and not callable(rule):
            raise TypeError(f"allocation should be a name, a mapping or a function of (layers, sparsity), got {rule!r}")
        if rule == "lamp" and self.normalize not in (None, "default", "lamp"):
            raise ValueError("allocation='lamp' makes scores comparable in its own way: leave normalize= out")

    @property
    def rule(self) -> SharedOut:
        """A name, a mapping or a function."""
        return self.scope if self.allocation is None else self.allocation

    @property
    def counted_cost(self) -> str | LatencyTable:
        """What shares are of: where amounts alone are given, the first of their costs."""
        return next(iter(self.at_most)) if self.at_most and self.cost == "units" else self.cost

    @property
    def targets(self) -> list[str]:
        """What sparsities are shares of, and ``at_most`` says, where these are not units."""
        costs = dict.fromkeys((self.counted_cost, *(self.at_most or ())))
        return [cost if isinstance(cost, str) else "latency" for cost in costs if cost != "units"]

    @property
    def cost_name(self) -> str:
        """The word for what a target is a share of."""
        return self.counted_cost if isinstance(self.counted_cost, str) else "latency"

    @property
    def is_given(self) -> bool:
        """Whether it says itself how much goes, so that no share of the whole is needed."""
        return isinstance(self.rule, Mapping) or self.at_most is not None

    def check_beside(self, *shares: object) -> None:
        """An error where amounts stand beside a share of what is not said, or beside a cost without a share.

        Raises:
            ValueError: with the word that is missing.
        """
        if self.at_most and (self.cost == "units") is any(share is not None for share in shares):
            raise ValueError(
                "beside at_most= give both or neither of sparsity= (or amount=) and cost=, which says what it is a "
                f"fraction of: 'parameters', 'flops', 'memory' or 'latency'; got cost={self.cost!r}"
            )

    def _normalizer(self, method: str, found: Candidates) -> str | None:
        """What scores go through before they are ranked.

        By default LAMP for filters and their layer's mean for channels, by measures whose scale is the layer's and
        nothing of the loss. The guide has what was measured: of LAMP's ranking channels keep more FLOPs.
        """
        if self.rule == "lamp":
            return "lamp"
        if self.normalize != "default":
            return self.normalize
        if method not in OF_WEIGHTS_ALONE or not all(candidate.structured for candidate in found.values()):
            return None
        return "mean" if all(candidate.coupled for candidate in found.values()) else "lamp"

    def plan(self, found: Candidates, goal: Goal, method: str = "") -> Plan:
        """What goes from where, round by round, by scores of a measure of this name.

        Raises:
            ValueError: if the goal cannot be met, with the numbers.
        """
        goal.check_count(sum(map(len, found.values())))
        if (blocks := _blocks(found)) is not None:
            return self._of_blocks(found, goal, blocks)
        self._check_units(found)
        layers = self._layers(found)
        normalizer = self._normalizer(method, found)
        comparable = None if normalizer is None else NORMALIZERS[normalizer]
        multiples = layers.multiples if layers.are_rounded else {}
        why = self._why(normalizer)
        made = partial(Plan, why, layers.bounds, comparable=comparable, multiples=multiples, levels=layers.levels)
        if self.counted_cost != "units":
            return made(spending=self._spending(found, goal, layers))
        if self.rule == "row":
            return made(rounds=layers.by_row(goal), by_row=True)
        return made(rounds=self._rounds(goal, layers))

    def _why(self, normalizer: str | None) -> str:
        named = self.rule if isinstance(self.rule, str) else "given" if isinstance(self.rule, Mapping) else "function"
        if normalizer is None or named == normalizer:
            return named
        return f"{named}, scores by LAMP" if normalizer == "lamp" else f"{named}, scores over their {normalizer}"

    def _check_units(self, found: Candidates) -> None:
        structured = all(candidate.structured for candidate in found.values())
        if not structured and all(candidate.coupled for candidate in found.values()):
            check_rule_of_blocks(self.rule, self.normalize)
        if self.round_to > 1 and not structured:
            raise ValueError(
                f"round_to={self.round_to} is for granularity='channel' and 'filter', whose units are a layer's width: "
                "leave it out"
            )
        if self.rule == "row" and any(candidate.output_axis is None for candidate in found.values()):
            raise ValueError("allocation='row' is for single weights, which a layer's outputs have: leave it out")

    def _of_blocks(self, found: Candidates, goal: Goal, blocks: Blocks) -> Plan:
        goal.check_pattern(blocks)
        for word in ("min_keep", "max_sparsity", "normalize", "allocation"):
            if getattr(self, word) not in (None, "default"):
                raise ValueError(
                    f"{word}={getattr(self, word)} has no part in n:m blocks, which keep n of every m: leave it out"
                )
        pools = [Pool((name,), len(one) * (blocks.m - blocks.n) // blocks.m) for name, one in found.items()]
        return Plan("n:m", bounds_of(found, 0, None), (pools,), blocks=blocks)

    def _rounds(self, goal: Goal, layers: Layers) -> tuple[Pools, ...]:
        rule = self.rule
        if self._is_ranking:
            return layers.ranked(goal)
        if rule == "isomorphic":
            return layers.by_kind(goal)
        if rule == "layer":
            return layers.each(dict.fromkeys(layers.units, goal))
        if isinstance(rule, Mapping):
            return layers.given(by_layer("allocation", rule, layers.units), goal)
        return layers.ruled(_function(rule), goal)

    def _layers(self, found: Candidates) -> Layers:
        multiples = multiples_of(found, self.round_to)
        bounds = bounds_of(found, self.min_keep, self.max_sparsity, keep_one=self.counted_cost != "units")
        if not self.uniform:
            return Layers(found, bounds, multiples)
        levels = Levels.of(found, multiples)
        return Layers(found, levels.bounded(bounds), multiples, levels)

    def range_of(self, found: Candidates) -> tuple[float, float, float]:
        """What all units cost, those that are left, and the least that these bounds allow."""
        self._check_units(found)
        return counted_range(found, self.cost, self._layers(found).least)

    def _spending(self, found: Candidates, goal: Goal, layers: Layers) -> Spending:
        if isinstance(self.rule, Mapping) or self.rule == "row":
            raise ValueError(
                f"cost={self.cost_name!r} decides how much is pruned from each layer, and so does "
                f"allocation={self.rule!r}: give one of the two"
            )
        met = allowances(found, goal, self.counted_cost, self.at_most or {}, layers.least, self._step(layers))
        if self._is_ranking:
            return Spending(met, layers.one_pool, layers.removable)
        split = layers.kinds_at if self.rule == "isomorphic" else layers.at(_function(self.rule))
        return Spending(met, split, lambda left: layers.total)

    @property
    def _is_ranking(self) -> bool:
        return self.rule in ("global", "lamp")

    def _step(self, layers: Layers) -> int | None:
        """How many units more of every layer go at once at the most; None: one ranking takes them one by one.

        A width that was rounded up is, for one unit more, rounded down.
        """
        by_one = self._is_ranking and not layers.are_rounded and not self.uniform and isinstance(self.cost, str)
        return None if by_one else 2 * max(layers.multiples.values(), default=1) - 1


def _function(rule: SharedOut) -> ShareRule:
    if isinstance(rule, str):
        return SHARE_RULES[rule]
    assert callable(rule)
    return rule


def total_of(found: Candidates, cost: str | LatencyTable) -> int:
    """What ``cost`` counts, with all units."""
    budget = Budget.of(found, cost)
    return sum(map(len, found.values())) if budget is None else budget.total


def gone_share(found: Candidates, cost: str | LatencyTable = "units") -> float:
    """The share that is gone already, of what ``cost`` counts."""
    if (budget := Budget.of(found, cost)) is not None:
        return 1 - budget.left(living_units(found)) / budget.total
    total = sum(map(len, found.values()))
    return 1 - sum(lefts(found)) / total if total else 0.0


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

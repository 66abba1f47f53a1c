"""Targets in what a model costs: a share of one cost, amounts of any, or both; what each allows after every round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import ceil
from typing import TypeAlias

from torch_flowprune.channels import Kept, LatencyTable
from torch_flowprune.scoring import Candidates
from torch_flowprune.selection.budget import Budget, living_units
from torch_flowprune.selection.goal import Goal, rounded_up
from torch_flowprune.selection.meters import COSTS
from torch_flowprune.selection.plan import Allowance

AtMost: TypeAlias = Mapping["str | LatencyTable", float]
"""What a model may cost in the end: milliseconds of latency, bytes of memory, a number of parameters or FLOPs."""


def checked_amounts(at_most: AtMost) -> dict[str | LatencyTable, float]:
    """Costs and positive amounts, and of a latency a table, for all rounds.

    Raises:
        ValueError, TypeError: for anything else.
    """
    known = [cost for cost in COSTS if cost != "units"]
    if not isinstance(at_most, Mapping) or not at_most:
        raise TypeError(f"at_most should be a mapping such as {{'latency': 12.5}} (milliseconds), got {at_most!r}")
    for cost, amount in at_most.items():
        if not isinstance(cost, LatencyTable) and cost not in known:
            raise ValueError(
                f"at_most: {cost!r} should be one of {', '.join(known)}, or a LatencyTable; for units use sparsity="
            )
        if isinstance(amount, bool) or not isinstance(amount, (int, float)) or not amount > 0:
            raise ValueError(f"at_most: {cost!r} should be a positive number, got {amount!r}")
    return {LatencyTable() if cost == "latency" else cost: amount for cost, amount in at_most.items()}


def allowances(
    found: Candidates,
    goal: Goal,
    cost: str | LatencyTable,
    amounts: AtMost,
    least: Mapping[str, int],
    step: int | None,
) -> tuple[Allowance, ...]:
    """What every target allows round by round; ``least`` units of each candidate stay, and ``step`` go at once.

    Amounts are come by as the share is: after a round each has come as much of its way as that has, or, where there is
    no share, as the schedule says of the first.

    Raises:
        ValueError: for a target that cannot be met, or that is behind what is gone.
    """
    units = living_units(found)
    made = [(_budget(found, one, least), amount) for one, amount in amounts.items()]
    ends = [_end(budget, budget.meter.counted(amount), units) for budget, amount in made]
    budgets = [budget for budget, _ in made]
    if goal.is_open and made:
        return _paced(budgets, ends, _travelled_by_first(goal, budgets[0].total, *ends[0]))
    main = _budget(found, cost, least)
    gone, wanted = _shared(main, goal, units, step, alone=not made)
    share = Allowance(main, goal.path(main.total, gone, max(gone, wanted)))
    if not made:
        return (share,)
    if wanted <= gone and goal.begun is None:  # the share is met, and paces nothing
        return (share, *_paced(budgets, ends, _travelled_by_first(goal, budgets[0].total, *ends[0])))
    start = gone if goal.begun is None else round(goal.begun * main.total)
    ways = _travelled(goal.path(main.total, start, max(start, wanted)), start, goal.end(main.total, wanted))
    return (share, *_paced(budgets, ends, ways))


def _budget(found: Candidates, cost: str | LatencyTable, least: Mapping[str, int]) -> Budget:
    made = Budget.of(found, cost, least)
    assert made is not None
    return made


def _shared(budget: Budget, goal: Goal, units: Kept, step: int | None, *, alone: bool) -> tuple[int, int]:
    """How much is gone, and should be after the call; where other targets took more, that is no mistake."""
    total = budget.total
    gone = total - budget.left(units)
    wanted = goal.gone(total, total - gone, partial(rounded_up, total=total))
    if alone and wanted < gone and budget.is_overdrawn(units, total - wanted, step):
        raise goal.too_low(f"the model is already at sparsity {gone / total:.4g} of its {budget.meter.name}")
    budget.check_reachable(units, total - wanted)
    return gone, wanted


def _end(budget: Budget, allowed: int, units: Kept) -> tuple[int, int]:
    """How much is gone, and will be in the end: no less than now, for a model may be under its target already."""
    budget.check_reachable(units, allowed)
    gone = budget.total - budget.left(units)
    return gone, max(gone, budget.total - allowed)


def _travelled(path: Sequence[int], start: int, end: int) -> list[float]:
    """How much of the way from a start to the end each round has come."""
    return [(after - start) / (end - start) if end > start else 1.0 for after in path]


def _travelled_by_first(goal: Goal, total: int, gone: int, wanted: int) -> list[float]:
    return _travelled(goal.path(total, gone, wanted), gone, wanted)


def _paced(budgets: Sequence[Budget], ends: Sequence[tuple[int, int]], ways: Sequence[float]) -> tuple[Allowance, ...]:
    return tuple(
        Allowance(budget, tuple(end if way >= 1 else gone + ceil((end - gone) * way) for way in ways))
        for budget, (gone, end) in zip(budgets, ends, strict=True)
    )


def counted_range(found: Candidates, cost: str | LatencyTable, least: Mapping[str, int]) -> tuple[float, float, float]:
    """With all units, with those that are left, and with the least that may stay of them, in the cost's own unit."""
    units = living_units(found)
    budget = Budget.of(found, cost, least)
    if budget is None:
        left = {name: int(alive.sum()) for name, alive in units.items()}
        bare = sum(min(count, least[name]) for name, count in left.items())
        return sum(map(len, found.values())), sum(left.values()), bare
    amount = budget.meter.amount
    return amount(budget.total), amount(budget.left(units)), amount(budget.left(budget.bare(units)))

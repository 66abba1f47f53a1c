"""The rounds of a pruner: what was asked for, and how much is gone after each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch_flowprune.channels import LatencyTable
from torch_flowprune.inputs import plain_number, whole_number
from torch_flowprune.scoring import Candidates
from torch_flowprune.selection import (
    Allocation,
    Goal,
    Schedule,
    check_listed,
    fraction,
    gone_share,
    listed,
    steps,
    to_prune,
    total_of,
)


@dataclass(frozen=True)
class Rounds:
    """A target and a schedule, or an amount of what is left in each round.

    Raises:
        ValueError, TypeError: for words out of range, or that do not go together.
    """

    sparsity: float | None = None
    amount: float | None = None
    rounds: int | None = None
    schedule: str | Schedule | Sequence[float] = "exponential"

    def __post_init__(self) -> None:
        if self.listed is not None:
            check_listed(self.listed, self.sparsity, self.amount, self.rounds)
        elif self.amount is not None:
            self._check_amount()
        elif self.sparsity is not None:
            fraction(self.sparsity)
        whole_number(self.count, "rounds")

    @property
    def listed(self) -> list[float] | None:
        """The sparsities themselves, where these are the schedule."""
        return listed(self.schedule)

    @property
    def count(self) -> int:
        """How many rounds."""
        given = 1 if self.rounds is None else plain_number(self.rounds)
        return given if self.listed is None else len(self.listed)

    def _check_amount(self) -> None:
        if self.sparsity is not None or self.schedule != "exponential":
            raise ValueError(
                f"amount={self.amount} should be alone: it is pruned from what is left in every round, so leave "
                "sparsity= and schedule= out"
            )
        if self.amount is not None:
            to_prune(self.amount, self.amount if isinstance(self.amount, int) else 1)  # its kind and range

    def goals(self, found: Candidates, allocation: Allocation) -> tuple[float, ...]:
        """The sparsity after each round; the last of them can be reached.

        Raises:
            ValueError: if it cannot, or is below what is gone.
        """
        Goal(rounds=self.count).check_count(sum(map(len, found.values())))
        if (blocks := next((one.blocks for one in found.values() if one.blocks is not None), None)) is not None:
            allocation.plan(found, Goal(self.sparsity, self.amount, self.count))
            return (1 - blocks.n / blocks.m,)
        allocation.check_beside(self.sparsity, self.amount, self.listed)
        if self.listed is None and self.amount is None:
            return self._scheduled(found, allocation)
        goals = tuple(self.listed or self._shares(found, allocation.cost))
        allocation.plan(found, Goal(goals[-1]))
        return goals

    def _scheduled(self, found: Candidates, allocation: Allocation) -> tuple[float, ...]:
        if self.sparsity is None and not allocation.is_given:
            raise ValueError(
                "give sparsity=, the fraction of all prunable units that are pruned after the last round, or amount=, "
                "what every round prunes of the units that are left"
            )
        plan = allocation.plan(found, Goal(self.sparsity))
        target = plan.sparsity if self.sparsity is None else fraction(self.sparsity)
        start = min(gone_share(found, allocation.counted_cost), target)  # whole channels overshoot a cost
        assert isinstance(self.schedule, str) or callable(self.schedule)
        return tuple(steps(self.schedule, self.count, start, target))

    def _shares(self, found: Candidates, cost: str | LatencyTable) -> tuple[float, ...]:
        """Round by round what is left, in whole units, or in what the cost counts."""
        assert self.amount is not None
        total = total_of(found, cost)
        left = total - round(gone_share(found, cost) * total)
        resumed, shares = left < total, []  # of a run that goes on less may be left than a number asks for
        for _ in range(self.count):
            left -= to_prune(min(self.amount, left) if resumed else self.amount, left)
            shares.append(1 - left / total if total else 0.0)
        return tuple(shares)

    def to_dict(self) -> dict[str, Any]:
        """Plain values to tell schedules apart by."""
        named = getattr(self.schedule, "__qualname__", None) or self.schedule
        schedule = self.listed if self.listed is not None else named
        return {"sparsity": self.sparsity, "amount": self.amount, "rounds": self.count, "schedule": schedule}

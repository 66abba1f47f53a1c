"""What a target is a share of, as values: a meter says how much of it a model costs where some of its units stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from torch_flowprune.channels import Costs, Kept, LatencyTable
from torch_flowprune.inputs import Ranks

COSTS = ("units", "parameters", "flops", "memory", "latency")


class Meter(Protocol):
    """Measures a model in whole numbers."""

    @property
    def name(self) -> str:
        """The word for what is measured."""

    def of(self, costs: Costs, kept: Kept) -> int:
        """How much the model costs with these units."""

    def text(self, amount: int) -> str:
        """An amount in words."""

    def counted(self, amount: float) -> int:
        """A user's amount in these whole numbers, rounded down."""

    def amount(self, count: int) -> float:
        """And back."""

    def largest(self, costs: Costs, kept: Kept) -> list[str]:
        """Where most of it is."""


@dataclass(frozen=True)
class Counter:
    """Parameters, FLOPs or bytes, as the model's costs count them."""

    name: str

    def of(self, costs: Costs, kept: Kept) -> int:
        return costs.count(self.name, kept)

    def counted(self, amount: float) -> int:
        return int(amount)

    def amount(self, count: int) -> float:
        return count

    def text(self, amount: int) -> str:
        return f"{amount:,} {'bytes of memory' if self.name == 'memory' else self.name}"

    def largest(self, costs: Costs, kept: Kept) -> list[str]:
        of = "parameters" if self.name == "memory" else self.name
        return [f"{name} ({count:,}{f' {of}' * (of != self.name)})" for name, count in costs.largest(of, kept)]


@dataclass(frozen=True, eq=False)
class Clock:
    """Nanoseconds by a table of operators; ranks, which choose alike, go by the first one's."""

    table: LatencyTable
    ranks: Ranks
    name: str = "latency"

    def of(self, costs: Costs, kept: Kept) -> int:
        calls = costs.calls(_widened({**costs.kept, **kept}, self.table.multiple))
        return round(1e6 * self._milliseconds([calls], costs.device)[0])

    def counted(self, amount: float) -> int:
        return int(round(1e6 * amount, 3))

    def amount(self, count: int) -> float:
        return count / 1e6

    def text(self, amount: int) -> str:
        return f"{amount / 1e6:.4g} ms of latency"

    def largest(self, costs: Costs, kept: Kept) -> list[str]:
        calls = costs.named_calls(_widened({**costs.kept, **kept}, self.table.multiple))
        taken = self._milliseconds([[call] for _, call in calls], costs.device)
        longest = sorted(zip(taken, (name for name, _ in calls), strict=True), reverse=True)[:3]
        return [f"{name} ({ms:.4g} ms)" for ms, name in longest]

    def _milliseconds(self, several: Sequence[Sequence[Any]], device: torch.device) -> list[float]:
        """Of calls, as the first rank measures them: it alone writes the table's file."""
        taken = torch.zeros(len(several), dtype=torch.float64, device="cpu")
        with self.ranks.together():
            if self.ranks.are_first:
                taken += taken.new_tensor([self.table.milliseconds(calls, device) for calls in several])
        found: list[float] = self.ranks.agreed(taken).tolist()
        return found


def meter_of(cost: str | LatencyTable, ranks: Ranks) -> Meter:
    """By its word, or a table of one's own."""
    if isinstance(cost, LatencyTable):
        return Clock(cost, ranks)
    return Clock(LatencyTable(), ranks) if cost == "latency" else Counter(cost)


def _widened(kept: Kept, multiple: int) -> Mapping[str, Tensor]:
    """Every width at the next multiple, finer where there are few units: of heads one by one."""
    return {name: _at_a_multiple(alive, max(1, min(multiple, len(alive) // 16))) for name, alive in kept.items()}


def _at_a_multiple(alive: Tensor, multiple: int) -> Tensor:
    more = -int(torch.count_nonzero(alive)) % multiple
    return alive | ((~alive).cumsum(0) <= more)

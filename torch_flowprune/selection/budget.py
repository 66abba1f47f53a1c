"""Targets in what a user pays for.

As few units go as bring the model's parameters, FLOPs, memory or latency down to an allowance.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from torch_flowprune.channels import Costs, Kept, LatencyTable
from torch_flowprune.scoring import Candidates, ranks_of
from torch_flowprune.selection.meters import Meter, meter_of


def living_units(candidates: Candidates) -> dict[str, Tensor]:
    """The units of each candidate that are left, as flags on the CPU."""
    flags = {name: candidate.alive() for name, candidate in candidates.items()}
    return {
        name: torch.ones(len(candidates[name]), dtype=torch.bool, device="cpu") if alive is None else alive.cpu()
        for name, alive in flags.items()
    }


@dataclass(frozen=True, eq=False)
class Budget:
    """What candidates cost.

    Attributes:
        costs: of the whole model.
        meter: which of them is meant.
        least: how many units each candidate keeps in any case.
    """

    costs: Costs
    meter: Meter
    least: Mapping[str, int]

    @classmethod
    def of(
        cls, candidates: Candidates, cost: str | LatencyTable, least: Mapping[str, int] | None = None
    ) -> Budget | None:
        """None where the target is a number of units.

        Raises:
            ValueError: for an unknown cost, and for units that cannot be removed physically.
        """
        if cost == "units":
            return None
        meter = meter_of(cost, ranks_of(candidates))
        costs = next((candidate.costs for candidate in candidates.values()), None)
        if costs is None:
            raise ValueError(
                f"cost={meter.name!r} counts what shrink leaves of the model, and it removes whole channels and "
                "blocks only: pass granularity='channel' or 'block', or leave cost= out (sparsity is then the fraction "
                "of all units); a coupling written by hand has no costs, one that fp.couple reads has"
            )
        made = cls(costs, meter, least or {})
        if not made.total:
            raise ValueError(
                f"the model has no {meter.name} that are counted: convolutions, matrix products and attention are; "
                "leave cost= out"
            )
        return made

    @cached_property
    def total(self) -> int:
        """With all units."""
        return self.left(self.costs.all)

    def left(self, kept: Kept) -> int:
        """With these."""
        return self.meter.of(self.costs, kept)

    def check_reachable(self, units: Kept, allowed: int) -> None:
        """An error if the model costs more than is allowed even with the least of its living units.

        Raises:
            ValueError: saying how much can go, and what it is that stays.
        """
        bare = self.bare(units)
        if (least := self.left(bare)) > allowed:
            largest = ", ".join(self.meter.largest(self.costs, bare))
            can, should = _percents(1 - least / self.total, 1 - allowed / self.total)
            raise ValueError(
                f"at most {can} of the model's {self.meter.text(self.total)} can be removed, and {should} should: it "
                f"can be reduced to {self.meter.text(least)}, and {self.meter.text(allowed)} were asked for (fp.range "
                "shows this before pruning); each group of channels keeps one at least (min_keep= may ask for more, "
                "round_to= for whole multiples), and what is not coupled stays whole. Most of what stays is in "
                f"{largest}; print(fp.couple(model, example_inputs)) lists what cannot be removed, and why"
            )

    def bare(self, units: Kept) -> dict[str, Tensor]:
        """The least of these units that may stay."""
        return {name: alive & (alive.cumsum(0) <= self.least.get(name, 0)) for name, alive in units.items()}

    def is_overdrawn(self, units: Kept, allowed: int, step: int | None = None) -> bool:
        """Whether more has gone than was needed: with the last step taken back the model costs no more than allowed.

        A step is one unit, whichever; or so many of every candidate. Whole channels overshoot a target by less than
        the last step, and to ask for the same target again is no mistake.
        """
        if step is not None:
            return self.left({name: alive | ((~alive).cumsum(0) <= step) for name, alive in units.items()}) <= allowed
        back = [
            {name: alive | (torch.arange(len(alive), device="cpu") == (~alive).nonzero()[0])}
            for name, alive in units.items()
            if not alive.all()
        ]
        return bool(back) and all(self.left({**units, **unit}) <= allowed for unit in back)

    def fewest(self, kept_without: Callable[[int], Kept], most: int, allowed: int, *, from_: int = 0) -> int:
        """How many units have to go, of at most ``most``, where ``kept_without(k)`` are those that stay when k go.

        The costs fall with k. No fewer than ``from_``, which another budget needs.
        """
        k = bisect_left(range(most + 1), True, lo=from_, key=lambda k: self.left(kept_without(k)) <= allowed)
        if k > most:
            self.check_reachable(kept_without(most), allowed)
        return min(k, most)


def _percents(one: float, other: float) -> tuple[str, str]:
    """Two fractions in percent, with as many digits as they differ in."""
    texts = ((f"{one:.{digits}%}", f"{other:.{digits}%}") for digits in (1, 2, 3, 4, 6))
    return next((pair for pair in texts if pair[0] != pair[1]), (f"{one:.9%}", f"{other:.9%}"))

"""How much is gone after a call, and after each of its rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, isclose, nextafter

from torch_flowprune.inputs import check_readable_again
from torch_flowprune.scoring import Blocks
from torch_flowprune.selection.schedules import Schedule, check_listed, fraction, listed, steps, through, to_prune


@dataclass(frozen=True)
class Goal:
    """A target, of all units or of what is left, and the rounds that lead to it.

    ``final`` is the sparsity that calls like this one end at, where this is not the last of them, and ``begun`` the one
    that the call before this went to.
    """

    sparsity: float | None = None
    amount: float | None = None
    rounds: int = 1
    schedule: str | Schedule = "exponential"
    final: float | None = None
    begun: float | None = None

    @classmethod
    def asked(
        cls,
        sparsity: float | None,
        amount: float | None,
        rounds: int | None,
        schedule: str | Schedule | Sequence[float],
    ) -> Goal:
        """From the words of a call: the sparsities themselves may be the schedule.

        Raises:
            ValueError: for sparsities that do not rise, or that another word contradicts.
        """
        if (values := listed(schedule)) is not None:
            check_listed(values, sparsity, amount, rounds)
            return cls(values[-1], None, len(values), through(values))
        assert isinstance(schedule, str) or not isinstance(schedule, Sequence)
        return cls(sparsity, amount, 1 if rounds is None else rounds, schedule)

    @property
    def is_open(self) -> bool:
        """Whether no total is given."""
        return self.sparsity is None and self.amount is None

    def gone(self, total: int, left: int, counted: Callable[[float], int] | None = None) -> int:
        """How many of ``total`` are gone after the call; ``counted`` says how many a sparsity is of them."""
        if (self.sparsity is None) == (self.amount is None):
            raise ValueError(
                "give sparsity= (of all prunable units, after the call) or amount= (torch's: of what is left), one of "
                "the two"
            )
        if self.sparsity is None:
            return total - left + to_prune(self.amount, left)  # type: ignore[arg-type]
        share = fraction(self.sparsity)
        return round(share * total) if counted is None else counted(share)

    def path(self, total: int, gone: int, goal: int) -> tuple[int, ...]:
        """How many are gone after each round."""
        start, end = (gone / total, goal / total) if total else (0.0, 0.0)
        shares = steps(self.schedule, self.rounds, start, end)
        return (*(max(gone, round(share * total)) for share in shares[:-1]), goal)

    def end(self, total: int, wanted: int) -> int:
        """How many are gone in the end, where ``wanted`` are after this call."""
        return wanted if self.final is None else max(wanted, round(self.final * total))

    def too_low(self, already: str) -> ValueError:
        """What is said where more is gone than was asked for."""
        return ValueError(
            f"{already}, and what is pruned stays pruned: sparsity={self.sparsity} is lower; give a higher one, or "
            "amount= for a fraction of what is left"
        )

    def check_pattern(self, blocks: Blocks) -> None:
        """For n:m blocks the pattern says how much goes: anything else asked for is a contradiction."""
        own = 1 - blocks.n / blocks.m
        asked = self.sparsity is not None and not isclose(fraction(self.sparsity), own)
        if asked or self.amount is not None or self.rounds != 1:
            raise ValueError(
                f"granularity '{blocks.n}:{blocks.m}' is sparsity {own:g} in one round: leave sparsity=, amount= and "
                f"rounds= out, and compare with sparsities={own:g}"
            )

    def check_count(self, units: int) -> None:
        """More rounds than there are units would take the time, and prune nothing in most of them."""
        if self.rounds > max(units, 1):
            raise ValueError(
                f"rounds={self.rounds} are more than there are units to prune, {units:,}: expected that many at most"
            )

    def check_rounds(self, data: object, *, scored: bool) -> None:
        """Several rounds score anew, which fixed scores and a one-shot iterator do not allow."""
        if self.rounds > 1 and scored:
            raise ValueError(
                f"rounds={self.rounds} computes new scores before each round, and scores= are fixed: leave out "
                "one of the two"
            )
        if self.rounds > 1:
            check_readable_again(f"rounds={self.rounds} reads the data in every round", data)


def rounded_up(share: float, total: int) -> int:
    """A share of a cost: never above the target, so what is gone is rounded up.

    >>> rounded_up(0.1, 1001)
    101
    """
    return ceil(Fraction(str(share)) * total)


def share_of(gone: int, total: int) -> float:
    """The share that :func:`rounded_up` makes so many of; a quotient alone may be a last digit too large.

    >>> rounded_up(5 / 6, 6), rounded_up(share_of(5, 6), 6)
    (6, 5)
    """
    share = gone / total if total else 0.0
    while rounded_up(share, total) > gone:
        share = nextafter(share, 0.0)
    return share

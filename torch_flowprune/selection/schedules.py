"""How much goes: torch's amounts, and sparsity as a function of the round.

A schedule takes ``(rounds, start, target)`` and returns the sparsity after each round, rising from ``start`` to exactly
``target``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite
from numbers import Integral, Real
from operator import index
from typing import SupportsFloat, TypeAlias

from torch_flowprune.inputs import plain_number, plain_sequence, whole_number

Schedule: TypeAlias = Callable[[int, float, float], list[float]]


def to_prune(amount: SupportsFloat, left: int) -> int:
    """How many of ``left`` units torch's ``amount`` removes: a fraction of what is left (float), or a number (int).

    Raises:
        TypeError: if it is not a number.
        ValueError: if it is out of range.

    >>> to_prune(0.25, 8), to_prune(3, 8)
    (2, 3)
    """
    amount = plain_number(amount)
    if isinstance(amount, bool) or not isinstance(amount, Real):
        raise TypeError(
            f"amount should be a fraction of what is left (float) or a number of units (int), got {amount!r}"
        )
    if isinstance(amount, Integral):
        if not 0 <= index(amount) <= left:
            raise ValueError(
                f"amount={amount} units should be pruned: expected 0 to {left}, the number of units left to prune"
            )
        return index(amount)
    return round(fraction(amount, "amount") * left)


def fraction(value: SupportsFloat, argument: str = "sparsity") -> float:
    """A number from 0 to 1, or an error that names the argument.

    >>> fraction(0.9)
    0.9
    """
    value = plain_number(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{argument} should be a number from 0.0 to 1.0, got {value!r}")
    if not 0 <= float(value) <= 1:
        hint = f"; for {value} percent write {float(value) / 100:g}" if 1.01 < float(value) <= 100 else ""
        raise ValueError(f"{argument}={value} should be from 0.0 to 1.0{hint}")
    return float(value)


def linear(rounds: int, start: float, target: float) -> list[float]:
    """Equal steps of sparsity.

    >>> linear(2, 0.0, 0.8)
    [0.4, 0.8]
    """
    return _exact([start + (target - start) * r / rounds for r in range(1, rounds + 1)], start, target)


def exponential(rounds: int, start: float, target: float) -> list[float]:
    """The same share of what is left in every round (Tanaka et al. 2020).

    >>> [round(s, 3) for s in exponential(2, 0.0, 0.75)]
    [0.5, 0.75]
    """
    if target == 1 and rounds > 1:
        raise ValueError("an exponential schedule never reaches sparsity 1.0: use schedule='linear'")
    density = 1 - start
    ratio = (1 - target) / density if density else 1.0
    return _exact([1 - density * ratio ** (r / rounds) for r in range(1, rounds + 1)], start, target)


def cubic(rounds: int, start: float, target: float) -> list[float]:
    """Fast first, slow at the end: target − (target − start)(1 − r/R)³ (Zhu & Gupta 2017).

    >>> cubic(2, 0.0, 1.0)
    [0.875, 1.0]
    """
    return _exact([target - (target - start) * (1 - r / rounds) ** 3 for r in range(1, rounds + 1)], start, target)


def paper(rounds: int, start: float, target: float) -> list[float]:
    """The paper's code: in round r the share P / (rP + R(1−P)) of what is left goes, P being removed in all.

    What is left after round r is (1−P) / (1−(1−r/R)P): steps that shrink.

    >>> [round(1 - s, 4) for s in paper(5, 0.0, 0.75)]
    [0.625, 0.4545, 0.3571, 0.2941, 0.25]
    """
    density = 1 - start
    share = (target - start) / density if density else 0.0
    if share == 1 and rounds > 1:
        raise ValueError("the paper's schedule never reaches sparsity 1.0: use schedule='linear'")
    return _exact(
        [1 - density * (1 - share) / (1 - (1 - r / rounds) * share) for r in range(1, rounds + 1)], start, target
    )


SCHEDULES: dict[str, Schedule] = {"linear": linear, "exponential": exponential, "cubic": cubic, "paper": paper}


def steps(schedule: str | Schedule, rounds: int, start: float, target: float) -> list[float]:
    """The sparsity after each round by a schedule's name or function, checked: it never falls and ends at the target.

    >>> steps("linear", 1, 0.0, 0.5)
    [0.5]
    """
    rounds = whole_number(rounds, "rounds")
    if isinstance(schedule, str) and schedule not in SCHEDULES:
        raise ValueError(
            f"unknown schedule {schedule!r}: expected one of {', '.join(SCHEDULES)} or a function of (rounds, start, "
            "target)"
        )
    function = SCHEDULES[schedule] if isinstance(schedule, str) else schedule
    sparsities = [plain_number(value) for value in function(rounds, start, target)]
    rising = sorted([start, *sparsities]) == [start, *sparsities]
    if len(sparsities) != rounds or not rising or not all(map(isfinite, sparsities)) or sparsities[-1] != target:
        raise ValueError(
            f"the schedule should give {rounds} sparsities rising from {start:g} to exactly {target:g}, "
            f"got {sparsities}"
        )
    return sparsities


def listed(schedule: str | Schedule | Sequence[float]) -> list[float] | None:
    """The sparsities themselves, where these are the schedule.

    >>> listed([0.5, 0.75]), listed("linear")
    ([0.5, 0.75], None)
    """
    values = plain_sequence(schedule)
    if isinstance(values, Sequence) and not isinstance(values, str):
        return [fraction(value) for value in values]
    return None


def check_listed(values: Sequence[float], sparsity: float | None, amount: float | None, rounds: int | None) -> None:
    """An error for sparsities that are no schedule, or that another word contradicts."""
    same = sparsity in (None, values[-1] if values else None) and rounds in (None, len(values))
    if not values or sorted(values) != values or not same or amount is not None:
        raise ValueError(
            f"schedule={values} should be rising sparsities, one a round, the last of them sparsity= where that is "
            "given, without amount="
        )


def through(values: Sequence[float]) -> Schedule:
    """The schedule that listed sparsities are.

    >>> through([0.5, 0.75])(2, 0.0, 0.75)
    [0.5, 0.75]
    """
    return lambda rounds, start, target: [*(min(value, target) for value in values[: rounds - 1]), target]


def _exact(values: list[float], start: float, target: float) -> list[float]:
    """Neither below the start nor off the target by what rounding made of them."""
    return [*(min(max(value, start), target) for value in values[:-1]), target]

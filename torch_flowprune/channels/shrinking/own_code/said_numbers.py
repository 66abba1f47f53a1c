"""What code says in place of a number: another, a share of what stands there, or others in turn; None for what stays.

A statement in a loop may need another number each time that it runs. Which it is goes by how often the statement has
run in the same call of its function: nothing is kept from one call to the next.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from typing_extensions import Self

_SHARE_OF_IT = "share"
_IN_TURN = "in turn"


def share(new: Any, old: Any) -> Any:
    """What to say of a number that grows with the batch too: which share of it is left; the number if that is none."""
    whole = type(new) is int and type(old) is int and new > 0 and old > 0
    left = Fraction(new, old) if whole else None
    return new if left is None else (_SHARE_OF_IT, left.numerator, left.denominator)


def in_turn(values: Sequence[Any]) -> tuple[Any, ...]:
    """What to say of a number that is another each time that its statement runs in a call of its function."""
    return (_IN_TURN, *values)


def is_share(value: Any) -> bool:
    """Whether it was made by ``share``."""
    return isinstance(value, tuple) and value[:1] == (_SHARE_OF_IT,)


def is_in_turn(value: Any) -> bool:
    """Whether it was made by ``in_turn``."""
    return isinstance(value, tuple) and value[:1] == (_IN_TURN,)


def is_said_anew(value: Any) -> bool:
    """A number, or several, whatever stood there."""
    several = value if isinstance(value, tuple) else ()
    return not any(number is None or is_share(number) or is_in_turn(number) for number in several)


def numbers_of_share(value: Any) -> tuple[int, int]:
    """Whole numbers, in a file that somebody wrote too."""
    _, new, old = value
    return operator.index(new), operator.index(old)


def value_over(before: Any, now: Any) -> Any:
    """What is said on top of what was said when it was made."""
    if now is None or before is None:
        return before if now is None else now
    if is_in_turn(before) or is_in_turn(now):
        return _in_turn_over(before, now)
    if is_share(now):
        left = Fraction(*now[1:])
        return (
            int(left * before) if isinstance(before, int) else share(*(left * Fraction(*before[1:])).as_integer_ratio())
        )
    several = isinstance(now, tuple) and isinstance(before, tuple) and len(now) == len(before) and not is_share(before)
    return tuple(map(value_over, before, now)) if several else now


def _in_turn_over(before: Any, now: Any) -> Any:
    runs = max(len(value) - 1 for value in (before, now) if is_in_turn(value))
    olds, news = (value[1:] if is_in_turn(value) else (value,) * runs for value in (before, now))
    return in_turn(tuple(map(value_over, olds, news))) if len(olds) == len(news) else now


def with_old_numbers(value: Any, before: Any) -> Any:
    """The numbers of an edit, those that stay as they were before, in a sequence of the same kind."""
    if not isinstance(value, tuple) or None not in value:
        return value
    numbers = tuple(old if new is None else new for old, new in zip(before, value, strict=True))
    return type(before)(numbers) if type(before) in (list, torch.Size) else numbers


def numbers_shown(value: Any) -> str:
    """As code has it, three dots for what stays."""
    if is_share(value):
        return f"{value[1]}/{value[2]} of it"
    if is_in_turn(value):
        return f"{', '.join(map(numbers_shown, value[1:]))} in turn"
    if not isinstance(value, tuple):
        return "..." if value is None else str(value)
    return f"({', '.join(map(numbers_shown, value))})"


class Turns:
    """In one call of a function, the numbers that its statements say in turn.

    Attributes:
        sequences: of each such number, what is said in its first run, its second, and so on.
        runs: of each, how often it was asked for.

    Raises:
        RuntimeError: where a statement runs more often, or in the end was run less often, than there are numbers: what
            was left out may not have been the last, and the numbers would be another run's.
    """

    def __init__(self, *sequences: Sequence[Any]) -> None:
        self.sequences = sequences
        self.runs = [0] * len(sequences)

    def __enter__(self) -> Self:
        return self

    def next(self, at: int, before: Any) -> Any:
        """The number of this run, in place of what stands there."""
        run = self.runs[at]
        self.runs[at] = run + 1
        if run >= len(self.sequences[at]):
            raise RuntimeError(self._ran_otherwise(at))
        value = self.sequences[at][run]
        if value is None:
            return before
        return before * value[1] // value[2] if isinstance(value, tuple) else value

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            for at, runs in enumerate(self.runs):
                if runs not in (0, len(self.sequences[at])):
                    raise RuntimeError(self._ran_otherwise(at))

    def _ran_otherwise(self, at: int) -> str:
        return (
            f"a statement with a different number in each pass ({numbers_shown(in_turn(self.sequences[at]))}) ran "
            f"{self.runs[at]} times in one call of its function, expected {len(self.sequences[at])}, as when the model "
            "was shrunk: run the whole loop (no layers dropped), or shrink to equal widths (round_to=, exclude=)"
        )

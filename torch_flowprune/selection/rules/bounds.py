"""What every layer keeps at least, and why: a floor of the user's, a cap, or that a layer of filters is not emptied."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import ceil
from typing import TypeAlias

from torch_flowprune.inputs import plain_number
from torch_flowprune.scoring import Candidates

PerLayer: TypeAlias = float | Mapping[str, float]


@dataclass(frozen=True)
class Bounds:
    """By layer.

    Attributes:
        units: how many there are.
        least: how many stay at least.
        word: what says so; the empty word where nothing does.
    """

    units: dict[str, int]
    least: dict[str, int]
    word: dict[str, str]

    def most(self, name: str, left: int) -> int:
        """How many units of a layer may be gone in all, where so many are left."""
        return self.units[name] - min(left, self.least[name])

    def check_total(self, gone: int, left: Mapping[str, int]) -> None:
        """An error if so many units cannot be gone.

        Raises:
            ValueError: with the numbers, and the word to change.
        """
        if gone > (most := sum(self.most(name, count) for name, count in left.items())):
            words = sorted({self.word[name] for name in left} - {""})
            raise ValueError(
                f"{gone:,} of {sum(self.units[name] for name in left):,} units should be pruned, and at most {most:,} "
                f"can: {' and '.join(words)} keep the rest; prune less, or lower what is kept (min_keep=0 lets layers "
                "be emptied)"
            )


def bounds_of(
    found: Candidates, min_keep: PerLayer | None, max_sparsity: PerLayer | None, *, keep_one: bool = False
) -> Bounds:
    """From what a user gives; ``keep_one``: whether no layer may be emptied, whatever is given."""
    units = {name: len(candidate) for name, candidate in found.items()}
    if all(one.coupled and not one.structured for one in found.values()):
        _check_names_blocks(("min_keep", min_keep, 0), ("max_sparsity", max_sparsity, 1))
    floors = {} if min_keep is None else by_layer("min_keep", min_keep, units)
    caps = {} if max_sparsity is None else by_layer("max_sparsity", max_sparsity, units)
    least: dict[str, int] = {}
    word: dict[str, str] = {}
    for name, candidate in found.items():
        one = candidate.structured and (keep_one or name not in floors)
        offers = {
            "min_keep=": _kept(floors[name], units[name]) if name in floors else 0,
            "max_sparsity=": _kept(1.0 - caps[name], units[name]) if name in caps else 0,
            "one unit a layer": min(1, units[name]) if one else 0,
        }
        least[name] = max(offers.values())
        word[name] = next(word for word, count in offers.items() if count == least[name]) if least[name] else ""
    return Bounds(units, least, word)


def _check_names_blocks(*words: tuple[str, PerLayer | None, int]) -> None:
    """An error for a number of units that every block should keep; the last of each is the one that holds none."""
    for word, value, none in words:
        if value is not None and not isinstance(value, Mapping) and value != none:
            raise ValueError(
                f"{word}={value} would hold every block, for each is one unit: name those that should stay, "
                f"{word}={{'blocks.0.*': {1 - none}}}"
            )


def by_layer(argument: str, value: PerLayer, names: Iterable[str]) -> dict[str, float]:
    """A number for every layer, or by name globs for those that match; of several globs the first holds.

    Raises:
        ValueError, TypeError: for a number out of range, and for a glob that matches no layer.
    """
    names = list(names)
    if not isinstance(value, Mapping):
        return dict.fromkeys(names, check_number(argument, value))
    bounds: dict[str, float] = {}
    for pattern, given in value.items():
        number = check_number(argument, given)
        if not (matched := [name for name in names if _matches_glob(name, pattern)]):
            near = difflib.get_close_matches(str(pattern), names, n=3, cutoff=0.4)
            hint = f"near: {', '.join(near)}" if near else f"the layers are {', '.join(names[:5])}"
            raise ValueError(f"{argument}: {pattern!r} matches no layer that is pruned; {hint}")
        for name in matched:
            bounds.setdefault(name, number)
    return bounds


def _matches_glob(name: str, pattern: object) -> bool:
    if not isinstance(pattern, str):
        raise TypeError(f"layers are picked by name globs, got {pattern!r}")
    return fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[0], pattern)


def check_number(argument: str, value: float) -> float:
    """A number in the range of its argument: a fraction, or for ``min_keep`` also a number of units.

    Raises:
        ValueError: for anything else.
    """
    value = plain_number(value)
    counted = argument == "min_keep" and isinstance(value, int)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0 or (value > 1 and not counted):
        meant = (
            "a number of units a layer keeps (int) or a fraction of the layer (float from 0 to 1)"
            if argument == "min_keep"
            else "a fraction of a layer's units, from 0.0 to 1.0"
        )
        raise ValueError(f"{argument} should be {meant}, got {value!r}")
    return value


def _kept(least: float, count: int) -> int:
    # 0.7 of 10 is 7.000000000000001 in floating point, and 7 all the same.
    return min(least, count) if isinstance(least, int) else ceil(round(least * count, 6))

"""Layers of repeated blocks to equal widths: as near to what a ranking left of them as their steps allow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations, product

from torch_flowprune.channels import Dial, UniformSizes
from torch_flowprune.scoring import Candidates
from torch_flowprune.selection.rules.bounds import Bounds

_WORD = "uniform=True"
_NEAR = 6
_MOST_TRIED = 200
_MOST_PAIRED = 8


@dataclass(frozen=True)
class Levels:
    """The widths that layers may have together.

    Attributes:
        uniform: which layers are to be equal, and which stay whole.
        multiples: what each width is a multiple of, unless nothing goes.
    """

    uniform: UniformSizes
    multiples: Mapping[str, int]

    @classmethod
    def of(cls, found: Candidates, multiples: Mapping[str, int]) -> Levels:
        """Of these candidates.

        Raises:
            ValueError: for units that are no channels.
        """
        alike = next((candidate.alike for candidate in found.values()), None)
        if alike is None:
            raise ValueError(
                "uniform=True is for granularity='channel', whose units are the widths that a class is built with: "
                "leave it out"
            )
        return cls(alike(found), multiples)

    def bounded(self, bounds: Bounds) -> Bounds:
        """With the narrowest widths of each, and all of what stays whole.

        Raises:
            ValueError: if nothing can become narrower, with the reason.
        """
        if not self.uniform.dials:
            raise ValueError(_no_dial(self.uniform))
        least, word = dict(bounds.least), dict(bounds.word)
        for name in self.uniform.held:
            least[name], word[name] = bounds.units[name], _WORD
        for dial in self.uniform.dials:
            narrowest = dial.kept(min(self._steps(dial, bounds.least, bounds.units)))
            for name, count in narrowest.items():
                word[name] = _WORD if count > least[name] else word[name]
                least[name] = max(least[name], count)
        return replace(bounds, least=least, word=word)

    def step(self, name: str) -> int:
        """How many units of a layer are removed together."""
        sizes = [(dial.sizes[name], dial.steps) for dial in self.uniform.dials if name in dial.sizes]
        return max([size // steps for size, steps in sizes], default=1)

    def levelled(self, kept: Mapping[str, int], left: Mapping[str, int], least: Mapping[str, int]) -> dict[str, int]:
        """How many units each layer keeps, so that equal ones stay equal; in all as near to ``kept`` as may be.

        Raises:
            ValueError: if no widths near these are such that the model's class can be built with them.
        """
        dials = self.uniform.dials
        steps = [self._steps(dial, least, left) for dial in dials]
        for dial, possible in zip(dials, steps, strict=True):
            if not possible:
                raise ValueError(_uneven(dial, left))
        wanted = sum(kept[name] for dial in dials for name in dial.sizes)
        nearest = _rounded([_steps_left(dial, kept) for dial in dials], dials, steps, wanted)
        for chosen in _by_nearness(nearest, dials, steps, wanted):
            made = dict(kept)
            for dial, step in zip(dials, chosen, strict=True):
                made |= dial.kept(step)
            if made == dict(left) or self.uniform.fits(made):
                return made
        widths = ", ".join(f"{next(iter(d.sizes))} {_steps_left(d, kept):.1f} of {d.steps} steps" for d in dials)
        raise ValueError(
            f"uniform=True: the class of the model takes none of the widths nearest to the target ({widths}); pass "
            "another sparsity, or leave one of these layers out (exclude=)"
        )

    def _steps(self, dial: Dial, least: Mapping[str, int], left: Mapping[str, int]) -> list[int]:
        """The steps at which every layer keeps enough, and no more than it has; in multiples, or all."""
        return [step for step in range(1, dial.steps + 1) if self._holds(dial.kept(step), least, left)]

    def _holds(self, kept: Mapping[str, int], least: Mapping[str, int], left: Mapping[str, int]) -> bool:
        return all(
            least[name] <= count <= left[name] and (count % self.multiples[name] == 0 or count == left[name])
            for name, count in kept.items()
        )


def _steps_left(dial: Dial, kept: Mapping[str, int]) -> float:
    """How many of its steps the layers keep, in the mean."""
    return dial.steps * sum(kept[name] for name in dial.sizes) / sum(dial.sizes.values())


def _rounded(shares: Sequence[float], dials: Sequence[Dial], steps: Sequence[Sequence[int]], wanted: int) -> list[int]:
    """A step of each dial next to its share; those nearest to the next are moved first, where that brings nearer.

    >>> _rounded([2.5, 5.2], [Dial({"a": 4}, 4), Dial({"b": 8}, 8)], [range(1, 5), range(1, 9)], 8)
    [3, 5]
    """
    pairs = list(zip(shares, steps, strict=True))
    below = [max((step for step in able if step <= share), default=able[0]) for share, able in pairs]
    chosen = list(below)

    def off(number: int, step: int) -> tuple[int, float]:
        units = _units(chosen, dials) + (step - chosen[number]) * dials[number].unit
        return abs(units - wanted), abs(step - shares[number])

    order = sorted(range(len(dials)), key=lambda number: shares[number] - below[number], reverse=True)
    for number in [*order, *order]:
        at = steps[number].index(chosen[number])
        chosen[number] = min(steps[number][max(at - 1, 0) : at + 2], key=partial(off, number))
    return chosen


def _units(chosen: Sequence[int], dials: Sequence[Dial]) -> int:
    return sum(step * dial.unit for step, dial in zip(chosen, dials, strict=True))


def _by_nearness(
    chosen: Sequence[int], dials: Sequence[Dial], steps: Sequence[Sequence[int]], wanted: int
) -> Iterator[list[int]]:
    """These steps, and then others of one dial, and of two, those first that keep nearly as many units as wanted."""
    yield list(chosen)
    near = [
        [(number, step) for step in sorted(able, key=lambda step, own=own: abs(step - own))[1 : _NEAR + 1]]  # type: ignore[misc]
        for number, (own, able) in enumerate(zip(chosen, steps, strict=True))
    ]
    moves = [[move] for moves in near for move in moves]
    if len(near) <= _MOST_PAIRED:
        moves += [list(pair) for one, other in combinations(near, 2) for pair in product(one, other)]
    others = [_with_steps(chosen, move) for move in moves]
    yield from sorted(others, key=lambda steps: abs(_units(steps, dials) - wanted))[:_MOST_TRIED]


def _with_steps(chosen: Sequence[int], moves: Iterable[tuple[int, int]]) -> list[int]:
    made = list(chosen)
    for number, step in moves:
        made[number] = step
    return made


def _no_dial(uniform: UniformSizes) -> str:
    name, reason = next(iter(uniform.held.items()), ("the model", "has no layers that are pruned"))
    return (
        f"uniform=True: none of the {len(uniform.held)} groups of channels can become smaller: {name}: {reason}; "
        "without it the shrunk model is none that its class makes, and fp.save_pruned writes it with its architecture"
    )


def _uneven(dial: Dial, left: Mapping[str, int]) -> str:
    counts = ", ".join(f"{name}: {left[name]} of {size}" for name, size in list(dial.sizes.items())[:5])
    return (
        f"uniform=True: layers that should stay equal have no width in common that is left to all of them, and is not "
        f"under what they keep at least ({counts}): lower min_keep= or round_to=, or start from an even model"
    )

"""Widths that are multiples of a number: units of the processor take them at full speed, or take no others."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch_flowprune.scoring import Candidates


def multiples_of(found: Candidates, round_to: int) -> dict[str, int]:
    """What each layer keeps a multiple of: this number, and what its operators take."""
    return {name: math.lcm(round_to, candidate.multiple) for name, candidate in found.items()}


def rounded(
    kept: Mapping[str, int], left: Mapping[str, int], least: Mapping[str, int], multiples: Mapping[str, int]
) -> dict[str, int]:
    """How many units each layer keeps: a multiple, or all that it has left; in all as near to ``kept`` as may be.

    A layer that keeps fewer than one multiple keeps one; the layers nearest to the next multiple are rounded up.

    >>> rounded({"a": 13, "b": 11}, {"a": 20, "b": 20}, {"a": 1, "b": 1}, {"a": 8, "b": 8})
    {'a': 16, 'b': 8}
    """
    down = {name: _down(kept[name], left[name], least[name], multiples[name]) for name in kept}
    up = {name: _up(count, left[name], multiples[name]) for name, count in down.items()}
    missing = sum(kept.values()) - sum(down.values())
    made = dict(down)
    for name in sorted(kept, key=lambda name: _share(kept[name], down[name], up[name]), reverse=True):
        step = up[name] - down[name]
        if step and missing >= step / 2:
            made[name], missing = up[name], missing - step
    return made


def _down(kept: int, left: int, least: int, multiple: int) -> int:
    if kept == left:
        return left
    return min(left, max(kept // multiple * multiple, narrowest(least, left, multiple)))


def _up(count: int, left: int, multiple: int) -> int:
    """The next multiple; where any number will do, it is what it should be already."""
    return count if multiple == 1 else min(left, (count // multiple + 1) * multiple)


def narrowest(least: int, left: int, multiple: int) -> int:
    """How many units a layer keeps at least, as a multiple, or all that it has left.

    >>> narrowest(0, 20, 8), narrowest(9, 20, 8), narrowest(1, 6, 8), narrowest(0, 6, 1)
    (8, 16, 6, 0)
    """
    return min(left, -(-max(least, multiple > 1) // multiple) * multiple)


def _share(kept: int, down: int, up: int) -> float:
    """How far towards the next multiple."""
    return (kept - down) / (up - down) if up > down else 0.0

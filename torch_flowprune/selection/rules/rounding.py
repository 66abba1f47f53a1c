"""Widths that are multiples of a number: tensor cores and vector units take them at their full speed."""

from __future__ import annotations

from collections.abc import Mapping


def rounded(
    kept: Mapping[str, int], left: Mapping[str, int], least: Mapping[str, int], multiple: int
) -> dict[str, int]:
    """How many units each layer keeps: a multiple, or all that it has left; in all as near to ``kept`` as may be.

    A layer that keeps fewer than one multiple keeps one; the layers nearest to the next multiple are rounded up.

    >>> rounded({"a": 13, "b": 11}, {"a": 20, "b": 20}, {"a": 1, "b": 1}, 8)
    {'a': 16, 'b': 8}
    """
    down = {name: _down(kept[name], left[name], least[name], multiple) for name in kept}
    up = {name: min(left[name], (count // multiple + 1) * multiple) for name, count in down.items()}
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


def narrowest(least: int, left: int, multiple: int) -> int:
    """How many units a layer keeps at least, as a multiple, or all that it has left.

    >>> narrowest(0, 20, 8), narrowest(9, 20, 8), narrowest(1, 6, 8), narrowest(0, 6, 1)
    (8, 16, 6, 0)
    """
    return min(left, -(-max(least, multiple > 1) // multiple) * multiple)


def _share(kept: int, down: int, up: int) -> float:
    """How far towards the next multiple."""
    return (kept - down) / (up - down) if up > down else 0.0

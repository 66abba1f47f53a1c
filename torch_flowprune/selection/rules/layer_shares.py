"""How much each layer gives up, by its shape alone: one short function a rule, and how to count it exactly.

A rule takes the layers and the sparsity of all of them together, and returns the sparsity of each by name. A function
of yours works wherever a rule's name does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import floor, prod
from typing import TypeAlias


@dataclass(frozen=True)
class LayerUnits:
    """What a rule knows of a layer.

    Attributes:
        name: as in scores and reports.
        shape: of its weights, outputs first: ``(64, 3, 7, 7)``.
        units: how many units it has.
    """

    name: str
    shape: tuple[int, ...]
    units: int


ShareRule: TypeAlias = Callable[[Sequence[LayerUnits], float], Mapping[str, float]]


def equal(layers: Sequence[LayerUnits], sparsity: float) -> dict[str, float]:
    """Every layer the same.

    >>> equal([LayerUnits("a", (4, 2), 8), LayerUnits("b", (2, 4), 8)], 0.5)
    {'a': 0.5, 'b': 0.5}
    """
    return dict.fromkeys((layer.name for layer in layers), sparsity)


def er(layers: Sequence[LayerUnits], sparsity: float) -> dict[str, float]:
    """Erdős-Rényi: a layer's density in proportion to (outputs + inputs) / (outputs · inputs).

    Source: Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity",
    Nature Communications 2018.

    >>> er([LayerUnits("a", (10, 10), 100), LayerUnits("b", (100, 100), 10000)], 0.9)["b"] > 0.9
    True
    """
    return _by_density(layers, sparsity, [sum(one.shape[:2]) / prod(one.shape[:2]) for one in layers])


def erk(layers: Sequence[LayerUnits], sparsity: float) -> dict[str, float]:
    """Erdős-Rényi-kernel: as :func:`er`, with the kernel's sides: Σ of all sizes / their product.

    Source: Evci et al., "Rigging the lottery", ICML 2020.

    >>> erk([LayerUnits("a", (8, 3, 3, 3), 216), LayerUnits("b", (64, 64, 3, 3), 36864)], 0.9)["a"]
    0.0
    """
    return _by_density(layers, sparsity, [sum(one.shape) / prod(one.shape) for one in layers])


SHARE_RULES: dict[str, ShareRule] = {"layer": equal, "er": er, "erk": erk}


def _by_density(layers: Sequence[LayerUnits], sparsity: float, raw: Sequence[float]) -> dict[str, float]:
    """Densities in proportion to ``raw``; a layer that would be over-full is dense, and the others make up for it."""
    wanted = (1 - sparsity) * sum(layer.units for layer in layers)
    dense: set[int] = set()
    while True:
        free = [i for i in range(len(layers)) if i not in dense]
        weight = sum(raw[i] * layers[i].units for i in free)
        scale = (wanted - sum(layers[i].units for i in dense)) / weight if weight else 0.0
        full = {i for i in free if scale * raw[i] > 1}
        if not full:
            return {layer.name: 0.0 if i in dense else 1 - scale * raw[i] for i, layer in enumerate(layers)}
        dense |= full


def counted_exactly(shares: Sequence[float], total: int, least: Sequence[int], most: Sequence[int]) -> list[int]:
    """Whole numbers near ``shares`` that add up to ``total``, each within its bounds; ties go to the first.

    What the bounds take from one is shared out among the others, in proportion.

    Raises:
        ValueError: if the bounds do not allow the total.

    >>> counted_exactly([2.5, 2.5, 5.0], 10, [0, 0, 0], [10, 10, 10])
    [3, 2, 5]
    >>> counted_exactly([5.0, 5.0], 10, [0, 0], [3, 10])
    [3, 7]
    """
    if not sum(least) <= total <= sum(most):
        raise ValueError(f"{total} units should be pruned, and the layers' bounds allow {sum(least)} to {sum(most)}")
    levels = _within_bounds(shares, total, least, most)
    counts = [min(high, max(low, floor(level + 1e-9))) for level, low, high in zip(levels, least, most, strict=True)]
    order = sorted(range(len(levels)), key=lambda i: counts[i] - levels[i])
    while (missing := total - sum(counts)) > 0:
        for i in [i for i in order if counts[i] < most[i]][:missing]:
            counts[i] += 1
    return counts


def _within_bounds(shares: Sequence[float], total: int, least: Sequence[int], most: Sequence[int]) -> list[float]:
    """The shares times one factor, cut off at the bounds, so that they add up: the factor is found by bisection."""
    positive = [max(share, 1e-12) for share in shares]

    def levels(factor: float) -> list[float]:
        return [min(high, max(low, factor * one)) for one, low, high in zip(positive, least, most, strict=True)]

    low, high = 0.0, 1.0
    while sum(levels(high)) < total and high < 1e18:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(levels(middle)) < total else (low, middle)
    return levels(high)

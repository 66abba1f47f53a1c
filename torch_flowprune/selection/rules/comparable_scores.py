"""Scores made comparable between layers: divided by a layer's mean, maximum or norm, or by LAMP's sums.

The order within a layer stays; what changes is how layers stand to each other in one ranking.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

Comparable: TypeAlias = Callable[[Tensor], Tensor]


def by_mean(scores: Tensor) -> Tensor:
    """Over the mean size of the layer's scores, Torch-Pruning's default.

    >>> by_mean(torch.tensor([1.0, 3.0]))
    tensor([0.5000, 1.5000])
    """
    return _over(scores, scores.abs().mean())


def by_max(scores: Tensor) -> Tensor:
    """Over the largest size of the layer's scores.

    >>> by_max(torch.tensor([1.0, 4.0]))
    tensor([0.2500, 1.0000])
    """
    return _over(scores, scores.abs().max())


def by_l2(scores: Tensor) -> Tensor:
    """Over the Euclidean norm of the layer's scores.

    >>> by_l2(torch.tensor([3.0, 4.0]))
    tensor([0.6000, 0.8000])
    """
    return _over(scores, torch.linalg.vector_norm(scores.double()).to(scores.dtype))


def lamp(scores: Tensor) -> Tensor:
    """LAMP: a score's square over the sum of the squares of all that are not lower, in the same layer.

    Every layer's highest is 1, so no layer is emptied before all are. Of equal scores the first counts as lower.

    Source: Lee et al., "Layer-adaptive sparsity for the magnitude-based pruning", ICLR 2021.

    Raises:
        ValueError: for signed scores, whose order the square would change.

    >>> lamp(torch.tensor([1.0, 2.0, 2.0]))
    tensor([0.1111, 0.5000, 1.0000])
    """
    if scores.numel() and scores.min() < 0:
        raise ValueError("'lamp' squares scores, and these are signed: use normalize='mean', or a measure of one sign")
    squares, order = scores.double().sort(stable=True)
    squares = squares.square()
    above = squares.flip(0).cumsum(0).flip(0)
    ranked = torch.where(above > 0, squares / above, 0.0)
    return torch.empty_like(ranked).scatter_(0, order, ranked).to(scores.dtype)


NORMALIZERS: dict[str, Comparable] = {"mean": by_mean, "max": by_max, "l2": by_l2, "lamp": lamp}


def _over(scores: Tensor, size: Tensor) -> Tensor:
    return scores / size if size > 0 else scores


def _wide(scores: Tensor) -> torch.dtype:
    """Whole numbers become floating point, half precision float32."""
    floating = scores.dtype if scores.is_floating_point() else torch.float64
    return floating if floating.itemsize >= 4 else torch.float32


def comparable(scores: Tensor, alive: Tensor | None, normalizer: Comparable) -> Tensor:
    """One layer's scores, made comparable over the units that are left; what is gone already keeps its score."""
    wide = scores.to(_wide(scores))
    if alive is None:
        return normalizer(wide) if scores.numel() else wide
    made = wide.clone()
    if alive.any():
        made[alive] = normalizer(wide[alive])
    return made

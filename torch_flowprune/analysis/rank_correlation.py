"""How alike two rankings are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_SAMPLE = 1 << 20


def spearman(one: Tensor, other: Tensor) -> float:
    """Spearman's rank correlation, ties at their mean rank; nan where all of one side is tied.

    >>> spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 4.0, 9.0]))
    1.0
    """
    a, b = _ranks(one), _ranks(other)
    a, b = a - a.mean(), b - b.mean()
    scale = (a.square().sum() * b.square().sum()).sqrt()
    return round(((a * b).sum() / scale).item(), 12) if scale else float("nan")


def laid_out(scores: Mapping[str, Tensor]) -> Tensor:
    """All scores in model order, every nth of them where there are more than a million."""
    stride = max(1, sum(map(torch.numel, scores.values())) // _SAMPLE)
    return torch.cat([value.reshape(-1)[::stride].cpu() for value in scores.values()])


def _ranks(values: Tensor) -> Tensor:
    _, place, counts = values.double().unique(return_inverse=True, return_counts=True)
    ranks: Tensor = (counts.cumsum(0) - (counts - 1) / 2).double()
    return ranks[place]

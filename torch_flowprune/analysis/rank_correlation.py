"""How alike two rankings are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

_SAMPLE = 1 << 20


def spearman(one: Tensor, other: Tensor) -> float:
    """Spearman's rank correlation, ties at their mean rank; nan where all of one side is tied.

    >>> spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 4.0, 9.0]))
    1.0
    """
    return _correlation(_centred_ranks(one), _centred_ranks(other))


def all_pairs(values: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """:func:`spearman` of every pair; each side is ranked once."""
    ranks = {name: _centred_ranks(value) for name, value in values.items()}
    return {one: {other: _correlation(ranks[one], ranks[other]) for other in ranks} for one in ranks}


def laid_out(layers: Iterable[Tensor], units: int) -> Tensor:
    """So many scores in model order, every nth of them where there are more than a million."""
    stride = max(1, units // _SAMPLE)
    return torch.cat([value.reshape(-1)[::stride].cpu() for value in layers])


def _correlation(a: Tensor, b: Tensor) -> float:
    scale = (a.square().sum() * b.square().sum()).sqrt()
    return round(((a * b).sum() / scale).item(), 12) if scale else float("nan")


def _centred_ranks(values: Tensor) -> Tensor:
    _, place, counts = values.double().unique(return_inverse=True, return_counts=True)
    by_value: Tensor = (counts.cumsum(0) - (counts - 1) / 2).double()
    ranks = by_value[place]
    return ranks - ranks.mean()

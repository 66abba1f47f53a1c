"""Ways of sharing out sparsity between layers: scores transformed, a floor, one ranking over all or one a layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Transform = Callable[[Tensor], Tensor]


def raw(scores: Tensor) -> Tensor:
    return scores


def over_mean(scores: Tensor) -> Tensor:
    return _over(scores, scores.mean())


def over_max(scores: Tensor) -> Tensor:
    return _over(scores, scores.max())


def over_l2(scores: Tensor) -> Tensor:
    return _over(scores, torch.linalg.vector_norm(scores))


def lamp(scores: Tensor) -> Tensor:
    """score² over the sum of all score² of the layer that are not lower (Lee et al., ICLR 2021), of units here."""
    squares = scores.double().square()
    order = squares.argsort(stable=True)
    not_lower = squares[order].flip(0).cumsum(0).flip(0)
    return torch.empty_like(squares).index_put_((order,), _over(squares[order], not_lower))


def _over(scores: Tensor, size: Tensor) -> Tensor:
    """A layer whose scores are all zero stays at zero."""
    return torch.where(size > 0, scores / size, torch.zeros_like(scores))


@dataclass(frozen=True)
class Sharing:
    """What ``fp.global_prune`` is given: scores transformed layer by layer, a floor, a scope."""

    transform: Transform = raw
    min_keep: float = 0
    scope: str = "global"

    def of(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.transform(value) for name, value in scores.items()}


SHARINGS = {
    "raw": Sharing(min_keep=0),
    "raw, one stays": Sharing(min_keep=1),
    "raw, at most 90 %": Sharing(min_keep=0.1),
    "raw, at most 80 %": Sharing(min_keep=0.2),
    "mean": Sharing(over_mean, 1),
    "max": Sharing(over_max, 1),
    "l2": Sharing(over_l2, 1),
    "lamp": Sharing(lamp, 1),
    "mean, at most 90 %": Sharing(over_mean, 0.1),
    "equal": Sharing(min_keep=1, scope="layer"),
}

"""The Hessian times vectors that are given, and what a loss is along them, in one sweep."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from torch_flowprune.gradients.batches import (
    Grads,
    MicroBatches,
    SizedBatch,
    add_weighted,
    add_weighted_squares,
    check_read,
    detached,
    dot_product,
    finite_mean_loss,
    length_of,
    over_ranks,
    scale,
    standard_error,
)
from torch_flowprune.gradients.operators import twice_differentiable
from torch_flowprune.gradients.sweeping.sweeps import Sweeps
from torch_flowprune.inputs import Batch, Ranks, users_level, wide, wide_type


@dataclass(frozen=True)
class ProposedCut:
    """What is thought to be removed: its values by parameter name, and the masks that say where."""

    removed: Mapping[str, Tensor] = field(default_factory=dict)
    masks: Mapping[str, Tensor] = field(default_factory=dict)


class Piece(NamedTuple):
    """What is run at once: the batch it is of, its loss, its gradient with the graph, and what it counts for."""

    batch: int
    loss: Tensor
    grads: Grads
    weight: float


_NOISE = 0.5
"""The share of the squares of a diagonal that may be those of its errors."""
AddPiece: TypeAlias = Callable[[Piece], None]


class Slopes:
    """Of the loss along a vector, batch by batch: their spread is the error of the mean."""

    def __init__(self) -> None:
        self.weights, self.sums = dict[int, float](), dict[int, Tensor]()

    def add(self, piece: Piece, slope: Tensor) -> None:
        slope = slope * piece.weight
        self.sums[piece.batch] = self.sums.get(piece.batch, 0) + slope
        self.weights[piece.batch] = self.weights.get(piece.batch, 0.0) + piece.weight

    def standard_error(self, ranks: Ranks) -> float:
        means = [total / self.weights[batch] for batch, total in self.sums.items()]
        return standard_error(torch.stack(means), [*self.weights.values()], ranks)


class Products(Sweeps):
    """Sweeps along vectors by parameter name."""

    def along(self, cut: ProposedCut, data: Iterable[Batch]) -> dict[str, Any]:
        """The loss, ‖g‖², and their expansions in θ less the cut, in one sweep: the fields of a ``Prediction``."""
        vector, g, product = self._vector(cut.removed), self._zeros(), self._zeros()
        slopes = Slopes()

        def add(piece: Piece) -> None:
            slopes.add(piece, self._dot(vector, detached(piece.grads)))
            add_weighted(g, detached(piece.grads), piece.weight)
            add_weighted(product, self.derivatives.product(piece.grads, vector), piece.weight)

        whole, loss = self._over_all(data, add, [g, product])
        return {
            "loss": loss,
            "standard_error": self._standard_error(slopes),
            "samples": self.seen,
            **self._expansions(scale(g, 1 / whole), scale(product, 1 / whole), vector, cut.masks),
        }

    def _standard_error(self, slopes: Slopes) -> float:
        return slopes.standard_error(self.ranks)

    def _dot(self, a: Sequence[Tensor], b: Sequence[Tensor | None]) -> Tensor:
        """Σ a·b over all parameters."""
        return dot_product(a, b)

    def times(self, v: Mapping[str, Tensor], data: Iterable[Batch]) -> dict[str, Tensor]:
        """H·v by name, in one sweep."""
        total, vector = self._zeros(), self._vector(v)

        def add(piece: Piece) -> None:
            add_weighted(total, self.derivatives.product(piece.grads, vector), piece.weight)

        whole, _ = self._over_all(data, add, [total])
        return self._named(scale(total, 1 / whole))

    def diagonal(self, data: Iterable[Batch], probes: int) -> dict[str, Any]:
        """The diagonal of H and its standard error: z·Hz for signs z that are drawn anew for each part of the data."""
        total, spread, draw = self._zeros(), self._zeros(), torch.Generator().manual_seed(self._seed())

        def add(piece: Piece) -> None:
            mean, squares = self._zeros(), self._zeros()
            for left in reversed(range(probes)):
                z = self._signs(draw)
                values = self.derivatives.product(piece.grads, z, retain_graph=left > 0)
                along = [None if h is None else h * one.to(h.device) for h, one in zip(values, z, strict=True)]
                add_weighted(mean, along, 1 / probes)
                add_weighted_squares(squares, along, 1 / probes)
            add_weighted(total, mean, piece.weight)
            variances = [(s - m.square()).clamp_(min=0) for s, m in zip(squares, mean, strict=True)]
            add_weighted(spread, variances, piece.weight**2 / (probes - 1) if probes > 1 else float("nan"))

        whole, _ = self._over_all(data, add, [total, spread])
        errors = [value.sqrt_() for value in scale(spread, 1 / whole**2)]
        scale(total, 1 / whole)
        _warn_of_noise(self._norm(total), self._norm(errors), probes)
        return {"diagH": self._named(total), "diagH_error": self._named(errors), "samples": self.seen}

    def _seed(self) -> int:
        """Of torch's own generator."""
        return int(torch.randint(2**62, (), device="cpu"))

    def _signs(self, draw: torch.Generator) -> list[Tensor]:
        """1 or −1 for each weight."""
        return [signs(one, draw).to(one.device, wide_type(one)) for one in self.parameters]

    def _norm(self, values: Sequence[Tensor]) -> float:
        return float(torch.stack([one.norm().cpu() for one in values]).norm())

    def _over_all(self, data: Iterable[Batch], add: AddPiece, sums: Sequence[list[Tensor]]) -> tuple[float, float]:
        """One sweep over the data, its sums over all ranks; the weight of it all, and the mean loss."""
        with self._sound():
            head, rest = self._stream(data)
            losses, weights = self._swept(chain(head, rest), length_of(data), add, held=len(sums))
            check_read(self.seen, weights)
            mean = finite_mean_loss(losses, weights)
            self.seen, whole, mean = over_ranks(self.ranks, sums, self.seen, sum(weights), mean)
            self.derivatives.warn_unreached(self.names)
        return whole, mean

    def _swept(
        self, batches: Iterable[SizedBatch], length: int | None, add: AddPiece, held: int
    ) -> tuple[list[Tensor], list[float]]:
        """Each piece with its gradient's graph handed to ``add``; the batches' losses and weights."""
        losses, weights, micro, self.seen = [], [], MicroBatches(self.derivatives, {"Hg"}, held), 0
        shown = self._shown(batches, length, "Hessian-vector product")
        for index, (batch, size) in enumerate(self.additivity.watched(shown)):
            loss, whole = torch.zeros((), device="cpu"), 0.0
            for part, count in micro.of(batch, size):
                weight = self.derivatives.weight(part, count)
                with twice_differentiable():
                    value = self.derivatives.loss(part, count)
                    add(Piece(index, value.detach(), self.derivatives.gradient(value, create_graph=True), weight))
                loss, whole = loss.to(value.device) + value.detach().double() * weight, whole + weight
            if whole:
                losses.append(loss / whole)
                weights.append(whole)
            self.seen += size
        return losses, weights

    def _vector(self, v: Mapping[str, Tensor]) -> list[Tensor]:
        """In the order of the parameters, 0 where nothing is given."""
        return [
            v[name].to(p.device) if name in v else torch.zeros_like(wide(p.detach()))
            for name, p in zip(self.names, self.parameters, strict=True)
        ]

    def _expansions(
        self, g: list[Tensor], product: list[Tensor], v: list[Tensor], masks: Mapping[str, Tensor]
    ) -> dict[str, float]:
        """Of the loss and of ‖g‖² in θ − v, from g and H·v."""
        moved = [one - Hv if name in masks else one for name, one, Hv in zip(self.names, g, product, strict=True)]
        lost = [
            torch.where(masks[name].to(one.device), 0, one) if name in masks else None
            for name, one in zip(self.names, moved, strict=True)
        ]
        return {
            "first_order": -self._dot(v, g).item(),
            "curvature": self._dot(v, product).item() / 2,
            "gradient_norm": self._dot(g, g).item(),
            "gradient_norm_change": -2 * self._dot(product, g).item(),
            "gradient_norm_curvature": self._dot(product, product).item(),
            "gradient_norm_lost": self._dot(moved, lost).item(),
        }


def _warn_of_noise(found: float, noise: float, probes: int) -> None:
    """Say so where most of what the probes found is their own error."""
    if probes > 1 and found and noise**2 > _NOISE * found**2:
        warnings.warn(
            f"the diagonal of H from {probes} probes is {min(noise / found, 1.0) ** 2:.0%} noise, by its own error "
            "bars: single weights are ranked nearly at random. Use more probes=, rank filters or channels, or use an "
            "exact measure: 'fisher_sample' has the diagonal of the empirical Fisher matrix",
            UserWarning,
            stacklevel=users_level(),
        )


def signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """1 or −1 in the shape of a tensor, drawn on the CPU, so that one seed gives the same on every device."""
    return torch.randint(2, like.shape, generator=generator, device="cpu").mul_(2).sub_(1)

"""The Hessian times vectors that are given, and what a loss is along them, in one sweep."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from torch_flowprune.gradients.batch_derivatives import Grads
from torch_flowprune.gradients.batch_streams import length_of
from torch_flowprune.gradients.microbatches import MicroBatches
from torch_flowprune.gradients.operators import twice_differentiable
from torch_flowprune.gradients.sweeps import Sweeps
from torch_flowprune.gradients.weighted_sums import (
    add_weighted,
    add_weighted_squares,
    check_read,
    detached,
    dot_product,
    finite_mean_loss,
    over_ranks,
    scale,
    standard_error,
)
from torch_flowprune.inputs import Batch, wide, wide_type


class Products(Sweeps):
    """Sweeps along vectors by parameter name."""

    def along(self, v: Mapping[str, Tensor], masks: Mapping[str, Tensor], data: Iterable[Batch]) -> dict[str, Any]:
        """The loss, ‖g‖², and their expansions in θ − v, in one sweep: the fields of a ``Prediction``."""
        with self._sound():
            return self._along(self._vector(v), masks, data)

    def times(self, v: Mapping[str, Tensor], data: Iterable[Batch]) -> dict[str, Tensor]:
        """H·v by name, in one sweep."""
        total, vector = self._zeros(), self._vector(v)

        def add(grads: Grads, weight: float) -> None:
            add_weighted(total, self.derivatives.product(grads, vector), weight)

        return self._named(scale(total, 1 / self._swept(data, add, [total])))

    def diagonal(self, data: Iterable[Batch], probes: int) -> dict[str, Any]:
        """The diagonal of H and its standard error: z·Hz for signs z that are drawn anew for each part of the data."""
        seed = int(torch.randint(2**62, (), device="cpu"))
        total, spread, draw = self._zeros(), self._zeros(), torch.Generator().manual_seed(seed)

        def add(grads: Grads, weight: float) -> None:
            mean, squares = self._zeros(), self._zeros()
            for left in reversed(range(probes)):
                signs = [_signs(p, draw) for p in self.parameters]
                values = self.derivatives.product(grads, signs, retain_graph=left > 0)
                along = [None if h is None else h * z.to(h.device) for h, z in zip(values, signs, strict=True)]
                add_weighted(mean, along, 1 / probes)
                add_weighted_squares(squares, along, 1 / probes)
            add_weighted(total, mean, weight)
            variances = [(s - m.square()).clamp_(min=0) for s, m in zip(squares, mean, strict=True)]
            add_weighted(spread, variances, weight**2 / (probes - 1) if probes > 1 else float("nan"))

        whole = self._swept(data, add, [total, spread])
        errors = [value.sqrt_() for value in scale(spread, 1 / whole**2)]
        return {"diagH": self._named(scale(total, 1 / whole)), "diagH_error": self._named(errors), "samples": self.seen}

    def _swept(self, data: Iterable[Batch], add: Callable[[Grads, float], None], sums: Sequence[list[Tensor]]) -> float:
        """One sweep that hands on each part's gradient with its graph; the weight of all the parts."""
        with self._sound():
            losses, weights, micro, self.seen = [], [], MicroBatches(self.derivatives, {"Hg"}), 0
            for batch, size in self._shown(chain(*self._stream(data)), length_of(data), "Hessian-vector product"):
                for part, count in micro.of(batch, size):
                    weights.append(self.derivatives.weight(part, count))
                    with twice_differentiable():
                        loss = self.derivatives.loss(part, count)
                        add(self.derivatives.gradient(loss, create_graph=True), weights[-1])
                    losses.append(loss.detach())
                self.seen += size
            check_read(self.seen, weights)
            self.derivatives.warn_unreached(self.names, stacklevel=6)
            finite_mean_loss(losses, weights)
            self.seen, whole, _ = over_ranks(self.ranks, sums, self.seen, sum(weights))
            return whole

    def _vector(self, v: Mapping[str, Tensor]) -> list[Tensor]:
        """In the order of the parameters, 0 where nothing is given."""
        return [
            v[name].to(p.device) if name in v else torch.zeros_like(wide(p.detach()))
            for name, p in zip(self.names, self.parameters, strict=True)
        ]

    def _along(self, vector: list[Tensor], masks: Mapping[str, Tensor], data: Iterable[Batch]) -> dict[str, Any]:
        g, product, samples_, losses, weights, slopes = self._zeros(), self._zeros(), 0, [], [], []
        micro = MicroBatches(self.derivatives, {"g", "Hg"})
        for batch, size in self._shown(chain(*self._stream(data)), length_of(data), "prediction"):
            of_parts, of_batch = [], 0.0
            for part, count in micro.of(batch, size):
                weight = self.derivatives.weight(part, count)
                loss, grads, along = self._derivatives_along(part, count, vector)
                add_weighted(g, grads, weight)
                add_weighted(product, along, weight)
                of_parts.append(torch.stack([loss.double(), dot_product(vector, grads)]) * weight)
                of_batch += weight
            samples_ += size
            if of_parts:
                loss, slope = torch.stack(of_parts).sum(0) / of_batch
                slopes.append(slope)
                losses.append(loss)
                weights.append(of_batch)
        check_read(samples_, weights)
        mean_loss = finite_mean_loss(losses, weights)
        count, total, mean_loss = over_ranks(self.ranks, [g, product], samples_, sum(weights), mean_loss)
        g, product = scale(g, 1 / total), scale(product, 1 / total)
        return {
            "loss": mean_loss,
            "standard_error": standard_error(torch.stack(slopes), weights, self.ranks),
            "samples": count,
            **self._expansions(g, product, vector, masks),
        }

    def _expansions(
        self, g: list[Tensor], product: list[Tensor], v: list[Tensor], masks: Mapping[str, Tensor]
    ) -> dict[str, float]:
        """Of the loss and of ‖g‖² in θ − v, from g and H·v."""
        lost = [
            torch.where(masks[name].to(gradient.device), 0, gradient - Hv)
            for name, gradient, Hv in zip(self.names, g, product, strict=True)
            if name in masks
        ]
        return {
            "first_order": -dot_product(v, g).item(),
            "curvature": dot_product(v, product).item() / 2,
            "gradient_norm": dot_product(g, g).item(),
            "gradient_norm_change": -2 * dot_product(product, g).item(),
            "gradient_norm_curvature": dot_product(product, product).item(),
            "gradient_norm_lost": dot_product(lost, lost).item(),
        }

    def _derivatives_along(self, batch: Batch, size: int, vector: Sequence[Tensor]) -> tuple[Tensor, Grads, Grads]:
        """One batch's loss, gradient, and the gradient's derivative along a vector."""
        with twice_differentiable():
            loss = self.derivatives.loss(batch, size)
            grads = self.derivatives.gradient(loss, create_graph=True)
            return loss.detach(), detached(grads), self.derivatives.product(grads, vector)


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """1 or −1, drawn on the CPU, so that one seed gives the same on every device."""
    signs = torch.randint(2, like.shape, generator=generator, device="cpu").mul_(2).sub_(1)
    return signs.to(like.device, wide_type(like))

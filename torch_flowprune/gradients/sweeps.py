"""The passes over the data that a flow takes: the one place that runs the model on them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import chain, islice
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from torch_flowprune.gradients.batch_derivatives import Derivatives, Grads
from torch_flowprune.gradients.batch_streams import SizedBatch, length_of, until, with_progress
from torch_flowprune.gradients.flow_source import FlowSource
from torch_flowprune.gradients.loss_weights import LossWeights
from torch_flowprune.gradients.microbatches import Graphs, MicroBatches
from torch_flowprune.gradients.operators import twice_differentiable
from torch_flowprune.gradients.same_data import check_same_losses, narrowest_dtype
from torch_flowprune.gradients.weighted_sums import (
    add_weighted,
    add_weighted_squares,
    check_read,
    detached,
    dot_product,
    finite_mean_loss,
    scale,
    standard_error,
    zero_sums,
)
from torch_flowprune.inputs import Batch, Ranks, Restore, Target, samples, sized, wide

Sums: TypeAlias = dict[str, list[Tensor]]


class Sweeps:
    """g, g2, g2_sample and Hg as weighted means over batches, in float32 or better."""

    def __init__(
        self,
        model: nn.Module,
        targets: Mapping[str, Target],
        source: FlowSource,
        rewind: Restore,
        ranks: Ranks,
    ) -> None:
        self.source, self.mode, self.progress = source, source.mode, source.progress
        self.rewind, self.ranks = rewind, ranks
        self.names = list(targets)
        self.parameters = [target.parameter for target in targets.values()]
        if not self.parameters:
            raise ValueError(
                "no parameter of this model requires a gradient: unfreeze some, or name those to score in parameters="
            )
        if source.offload and not ranks.alone:
            raise ValueError(
                "offload=True keeps the sums on the host, where ranks do not add them up: score in one process"
            )
        self.offload, self.seen, self.losses = source.offload, 0, list[Tensor]()
        weights = LossWeights(model, source.objective, source.reduction)
        self.derivatives = Derivatives(model, self.parameters, source.objective, source.mode, source.resources, weights)

    def run(self, data: Iterable[Batch], wanted: set[str]) -> dict[str, Any]:
        """The wanted fields of a flow, with ``loss`` and ``samples``."""
        micro = MicroBatches(self.derivatives, wanted)
        head, stream = self._stream(data)
        check_read(len(head))
        if "Hg" not in wanted:
            return self._first(chain(head, stream), wanted, length_of(data), micro, None)
        if len(head) == 1 and self.ranks.alone and not self.offload and len(micro.of(*head[0])) == 1:
            return self._single(head[0], wanted)
        if isinstance(data, Iterator) and (len(head) > 1 or self.mode == "train"):
            raise ValueError(
                "H·g takes two sweeps over the data, and this iterator can be read only once: pass a list or a "
                "DataLoader"
            )
        graphs = Graphs(micro)
        fields = self._first(chain(head, stream), wanted, length_of(data), micro, graphs)
        self.rewind()
        again = iter(head) if isinstance(data, Iterator) else chain(*self._stream(data))
        return {**fields, "Hg": self._second(again, fields, length_of(data), micro, graphs)}

    def along(self, v: Mapping[str, Tensor], masks: Mapping[str, Tensor], data: Iterable[Batch]) -> dict[str, Any]:
        """The loss, ‖g‖², and their expansions in θ − v, in one sweep: the fields of a ``Prediction``."""
        vector = [
            v[name].to(p.device) if name in v else torch.zeros_like(wide(p.detach()))
            for name, p in zip(self.names, self.parameters, strict=True)
        ]
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
        count, total, mean_loss = self._over_ranks([g, product], samples_, sum(weights), mean_loss)
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

    def _stream(self, data: Iterable[Batch]) -> tuple[list[SizedBatch], Iterator[SizedBatch]]:
        """The first two batches and the rest.

        Both sweeps read ahead alike: data and model may draw from one source of randomness.
        """
        stream = sized(data, self.parameters[0].device, self.source.max_samples, self.source.batch_size)
        return list(islice(stream, 2)), stream

    def _first(
        self,
        batches: Iterable[SizedBatch],
        wanted: set[str],
        length: int | None,
        micro: MicroBatches,
        graphs: Graphs | None,
    ) -> dict[str, Any]:
        sums: Sums = {kind: self._zeros() for kind in ("g", "g2", "g2_sample") if kind in wanted}
        losses, weights, self.seen = [], [], 0
        for batch, size in self._shown(batches, length, "gradient"):
            self.seen += size
            if parts := micro.of(batch, size):
                losses.append(self._gradient(sums, (batch, size), parts, micro, graphs))
                weights.append(self.derivatives.weight(batch, size))
        self.losses = losses
        check_read(self.seen, weights)
        self.derivatives.warn_unreached(self.names, stacklevel=5)
        loss = finite_mean_loss(losses, weights)
        count, whole, mean_loss = self._over_ranks(sums.values(), self.seen, sum(weights), loss)
        return self._fields({kind: scale(total, 1 / whole) for kind, total in sums.items()}, mean_loss, count)

    def _gradient(
        self, sums: Sums, whole: SizedBatch, parts: list[SizedBatch], micro: MicroBatches, graphs: Graphs | None
    ) -> Tensor:
        """One batch's gradient into the sums, by its parts; or by the whole, and its graph kept for a second sweep."""
        batch, size = whole
        keep = graphs is not None and graphs.active and len(parts) == 1 and graphs.expect(batch, size)
        # g goes through the operators that Hg will go through: kernels draw dropout in ways of their own
        with twice_differentiable() if keep or (micro.second and self.mode == "train") else nullcontext():
            if len(parts) > 1:
                loss, grads = self._of_parts(parts)
            else:
                loss = self.derivatives.loss(*whole)
                grads = self.derivatives.gradient(loss, create_graph=keep)
        if keep and graphs is not None:
            graphs.add(grads, batch, size)
        self._accumulate(sums, detached(grads), batch, size)
        return loss.detach()

    def _of_parts(self, parts: Sequence[SizedBatch]) -> tuple[Tensor, Grads]:
        total, losses, whole = self._zeros(), [], 0.0
        for part in parts:
            weight, loss = self.derivatives.weight(*part), self.derivatives.loss(*part)
            add_weighted(total, self.derivatives.gradient(loss), weight)
            losses.append(loss.detach() * weight)
            whole += weight
        return torch.stack(losses).sum() / whole, list(scale(total, 1 / whole))

    def _second(
        self,
        batches: Iterator[SizedBatch],
        first: Mapping[str, Any],
        length: int | None,
        micro: MicroBatches,
        graphs: Graphs,
    ) -> dict[str, Tensor]:
        """H·g: each batch's gradient, differentiated along the mean gradient that the first sweep gave."""
        along, total, whole = list(first["g"].values()), self._zeros(), 0.0
        losses, count = list[Tensor](), sum(kept[1] for kept in graphs.kept)
        for batch, size in self._shown(
            until(batches, self.seen - count if graphs.kept else sys.maxsize), length, "Hessian-gradient product"
        ):
            of_parts, of_batch = [], 0.0
            for part in micro.of(batch, size):
                weight = self.derivatives.weight(*part)
                of_batch += weight
                with twice_differentiable() as weight_gradients:
                    loss = self.derivatives.loss(*part)
                    with weight_gradients.unread():
                        grads = self.derivatives.gradient(loss, create_graph=True)
                    add_weighted(total, self.derivatives.product(grads, along), weight)
                of_parts.append(loss.detach().double() * weight)
            if of_parts:
                losses.append(torch.stack(of_parts).sum() / of_batch)
            whole += of_batch
            count += size
        while graphs.kept:
            grads, _, _, weight = graphs.kept.popleft()
            with twice_differentiable():  # checkpointed blocks run again
                add_weighted(total, self.derivatives.product(grads, along), weight)
            whole += weight
        count, whole, _ = self._over_ranks([total], count, whole)
        if count != first["samples"]:
            raise ValueError(
                f"the data gave {first['samples']} samples on the first sweep, {count} on the second: g and H need "
                "the same data"
            )
        self._check_losses(losses)
        return self._named(scale(total, 1 / whole))

    def _check_losses(self, losses: list[Tensor]) -> None:
        if self.mode == "eval":  # in train mode a model may move by itself: power iteration, statistics
            autocast = self.derivatives.resources.autocast
            check_same_losses(self.losses, losses, autocast or narrowest_dtype(self.parameters), self.ranks)

    def _single(self, sized_batch: SizedBatch, wanted: set[str]) -> dict[str, Any]:
        """One batch needs no second sweep: the graph of its gradient is differentiated again."""
        batch, size = sized_batch
        with twice_differentiable():
            loss = self.derivatives.loss(batch, size)
            grads = self.derivatives.gradient(loss, create_graph=True)
            values = detached(grads)
            g = add_weighted(self._zeros(), values, 1)
            product = add_weighted(self._zeros(), self.derivatives.product(grads, g), 1)
        self.derivatives.warn_unreached(self.names, stacklevel=5)
        sums: Sums = {kind: self._zeros() for kind in ("g2", "g2_sample") if kind in wanted}
        self._accumulate(sums, values, batch, size)
        whole = self.derivatives.weight(batch, size)
        means: Sums = {"g": g, "Hg": product, **{kind: scale(total, 1 / whole) for kind, total in sums.items()}}
        return self._fields(means, finite_mean_loss([loss.detach()], [size]), size)

    def _accumulate(self, sums: Sums, grads: Grads, batch: Batch, size: int) -> None:
        weight = self.derivatives.weight(batch, size)
        if "g" in sums:
            add_weighted(sums["g"], grads, weight)
        if "g2" in sums:
            add_weighted_squares(sums["g2"], grads, weight)
        if "g2_sample" in sums:
            for sample in samples(batch, size):
                if weight := self.derivatives.weight(sample, 1):
                    gradient = self.derivatives.gradient(self.derivatives.loss(sample, 1))
                    add_weighted_squares(sums["g2_sample"], gradient, weight)

    def _over_ranks(
        self, sums: Iterable[list[Tensor]], count: int, weight: float, loss: float = 0.0
    ) -> tuple[int, float, float]:
        """Sums, number of samples, their weight and mean loss of all ranks together."""
        for values in sums:
            self.ranks.sum(values)
        totals = torch.tensor([count, weight, loss * weight], dtype=torch.float64, device=self.parameters[0].device)
        self.ranks.sum([totals])
        samples, whole, total = totals.tolist()
        return int(samples), whole, total / whole

    def _fields(self, means: Sums, loss: float, samples: int) -> dict[str, Any]:
        return {**{kind: self._named(mean) for kind, mean in means.items()}, "loss": loss, "samples": samples}

    def _zeros(self) -> list[Tensor]:
        return zero_sums(self.parameters, on_host=self.offload)

    def _named(self, values: Iterable[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.names, values, strict=True))

    def _shown(self, batches: Iterable[SizedBatch], total: int | None, name: str) -> Iterable[SizedBatch]:
        return with_progress(batches, total, name, self.progress)

"""The passes over the data that a flow takes: the one place that runs the model on them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain, islice
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from torch_flowprune.gradients.batches import (
    Additivity,
    Derivatives,
    Grads,
    Graphs,
    LossWeights,
    MicroBatches,
    SampleLosses,
    SizedBatch,
    add_weighted,
    add_weighted_squares,
    check_read,
    check_runs_alone,
    check_same_count,
    check_same_losses,
    detached,
    finite_mean_loss,
    length_of,
    no_hidden_blocks,
    over_ranks,
    scale,
    taken,
    until,
    with_progress,
    zero_sums,
)
from torch_flowprune.gradients.differentiable import dense_gradients
from torch_flowprune.gradients.flow_source import FlowSource
from torch_flowprune.gradients.operators import twice_differentiable
from torch_flowprune.gradients.sample_squares import SampleSquares
from torch_flowprune.gradients.sweeping.curvature_check import check_curvature, check_is_due
from torch_flowprune.gradients.sweeping.input_moments import MOMENTS, InputMoments
from torch_flowprune.gradients.untrained_statistics import warn_untrained
from torch_flowprune.inputs import (
    Batch,
    Ranks,
    Restore,
    Target,
    check_readable_again,
    in_dtype,
    in_float32,
    is_half,
    same_randomness,
    sized,
)

Sums: TypeAlias = dict[str, list[Tensor]]


class Sweeps:
    """g, g2, g2_sample and Hg as weighted means over batches, in float32 or better."""

    def __init__(
        self, model: nn.Module, targets: Mapping[str, Target], source: FlowSource, rewind: Restore, ranks: Ranks
    ) -> None:
        self.source, self.mode, self.progress = source, source.mode, source.progress
        self.model, self.half, self.rewind, self.ranks = model, is_half(model), rewind, ranks
        self.targets, self.names = targets, list(targets)
        self.parameters = [target.parameter for target in targets.values()]
        if not self.parameters:
            raise ValueError(
                "no parameter of this model requires a gradient: unfreeze some, or name those to score in parameters="
            )
        if source.offload and not ranks.alone:
            raise ValueError(
                "offload=True keeps the sums on the host, where ranks do not add them up: score in one process"
            )
        warn_untrained(model, source.mode)
        self.offload, self.seen, self.losses = source.offload, 0, list[Tensor]()
        self.moments: InputMoments | None = None
        self.derivatives = self._with(LossWeights(model, source.objective, source.reduction, source.batch_dim))
        self.additivity, self.of_samples = Additivity(self.derivatives, ranks), SampleLosses(self.derivatives)
        self.squares = SampleSquares(self.derivatives, targets.values(), source)

    def _with(self, weights: LossWeights) -> Derivatives:
        source = self.source
        return Derivatives(self.model, self.parameters, source.objective, source.mode, source.resources, weights)

    def run(self, data: Iterable[Batch], wanted: set[str]) -> dict[str, Any]:
        """The wanted fields of a flow, with ``loss`` and ``samples``."""
        with self._sound():
            return self._run(data, wanted)

    @contextmanager
    def _sound(self) -> Iterator[None]:
        """Around all runs of the model: in digits that do for derivatives, and with no block hidden from them."""
        with in_float32(self.model), dense_gradients(self.model), no_hidden_blocks():
            yield

    def _run(self, data: Iterable[Batch], wanted: set[str]) -> dict[str, Any]:
        micro = MicroBatches(self.derivatives, wanted)
        if "g2_sample" in wanted:
            check_runs_alone(self.model)
        head, stream = self._stream(data)
        check_read(len(head))
        self.moments = self._moments_of(kinds) if (kinds := wanted & MOMENTS.keys()) else None
        batches = chain(head, stream)
        if wanted == kinds:
            return self._forwards(batches, length_of(data))
        if "Hg" not in wanted:
            return self._first(batches, wanted, length_of(data), micro, None)
        if len(head) == 1 and self.ranks.alone and not self.offload and len(micro.of(*head[0])) == 1:
            fields = self._single(*next(self._observed(head)), wanted)
        else:
            fields = self._twice(data, head, stream, wanted, micro)
        if check_is_due(self.source, len(self.losses), alone=self.ranks.alone):
            check_curvature(self.derivatives, self.names, list(fields["g"].values()), *head[0], asked=self.source.check)
        return fields

    def _moments_of(self, kinds: set[str]) -> InputMoments:
        return InputMoments(self.model, self.targets, self.source, kinds)

    def _forwards(self, batches: Iterable[SizedBatch], length: int | None) -> dict[str, Any]:
        """Moments of inputs alone, which take no loss."""
        self.seen = sum(size for _, size in self._shown(self._observed(batches), length, "forward"))
        check_read(self.seen)
        self.ranks.sum(totals := [torch.tensor([float(self.seen)], device=self.parameters[0].device)])
        return {**self.moments.means(self.ranks), "samples": int(totals[0])} if self.moments else {}

    def _observed(self, batches: Iterable[SizedBatch]) -> Iterator[SizedBatch]:
        """Batches on their way, after a forward of their own where moments of inputs are wanted."""
        for batch, size in batches:
            if self.moments:
                self.moments.add(batch, size)
            yield batch, size

    def _twice(
        self,
        data: Iterable[Batch],
        head: list[SizedBatch],
        stream: Iterator[SizedBatch],
        wanted: set[str],
        micro: MicroBatches,
    ) -> dict[str, Any]:
        """Everything in a first sweep, H·g in a second one over the same data."""
        if len(head) > 1 or self.mode == "train":
            check_readable_again("H·g takes two sweeps over the data", data)
        graphs = Graphs(micro)
        fields = self._first(chain(head, stream), wanted, length_of(data), micro, graphs)
        self.rewind()
        again = iter(head) if isinstance(data, Iterator) else chain(*self._stream(data))
        return {**fields, "Hg": self._second(again, fields, length_of(data), graphs)}

    def _stream(self, data: Iterable[Batch]) -> tuple[list[SizedBatch], Iterator[SizedBatch]]:
        """The first two batches and the rest: sweeps read ahead alike, as data and model may draw from one source."""
        stream = sized(data, self.parameters[0].device, *self.source.counting_words)
        if self.half:
            stream = ((in_dtype(batch, torch.float32, torch.float16), size) for batch, size in stream)
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
        for batch, size in self.additivity.watched(self._shown(self._observed(batches), length, "gradient")):
            self.seen += size
            if parts := micro.of(batch, size):
                losses.append(self._gradient(sums, (batch, size), parts, micro, graphs))
                weights.append(self.derivatives.weight(batch, size))
            elif graphs is not None:
                graphs.pass_by(size)
        self.losses = losses
        check_read(self.seen, weights)
        self.of_samples.check(self.losses, self.ranks)
        self.derivatives.warn_unreached(self.names)
        loss = finite_mean_loss(losses, weights)
        count, whole, loss = over_ranks(self.ranks, sums.values(), self.seen, sum(weights), loss)
        return self._fields({kind: scale(total, 1 / whole) for kind, total in sums.items()}, loss, count)

    def _gradient(
        self, sums: Sums, whole: SizedBatch, parts: list[SizedBatch], micro: MicroBatches, graphs: Graphs | None
    ) -> Tensor:
        """One batch's gradient into the sums, by its parts; or by the whole, and its graph kept for a second sweep."""
        batch, size = whole
        keep = graphs is not None and graphs.active and len(parts) == 1 and graphs.expect(batch, size)
        # g goes through the operators that Hg will go through: kernels draw dropout in ways of their own
        with twice_differentiable() if keep or (micro.second and self.mode == "train") else nullcontext():
            squared, at_once = None, "g2_sample" in sums and len(parts) == 1 and not keep
            if at_once:
                squared = self.squares.with_gradient(sums["g2_sample"], *whole, wanted=len(sums) > 1)
            if squared:
                loss, grads = squared
            elif len(parts) > 1:
                loss, grads = self._of_parts(parts)
            else:
                loss = self.derivatives.loss(*whole)
                grads = self.derivatives.gradient(loss, create_graph=keep)
        if graphs is not None:
            graphs.add(grads, batch, size) if keep else graphs.give_up()
        rest = {kind: total for kind, total in sums.items() if kind != "g2_sample"} if squared else sums
        self._accumulate(rest, detached(grads), batch, size)
        if squared:
            self.of_samples.add(loss.detach().double(), *whole)  # the probe has seen that it is made of theirs
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
        self, batches: Iterator[SizedBatch], first: Mapping[str, Any], length: int | None, graphs: Graphs
    ) -> dict[str, Tensor]:
        """H·g: each batch's gradient, differentiated along the mean gradient that the first sweep gave."""
        along, total, whole = list(first["g"].values()), self._zeros(), 0.0
        losses, count = list[Tensor](), sum(kept[1] for kept in graphs.kept)
        for batch, size in self._shown(
            until(batches, self.seen - count if graphs.kept else sys.maxsize), length, "Hessian-gradient product"
        ):
            of_parts, of_batch = [], 0.0
            for part in graphs.micro.of(batch, size):
                weight = self.derivatives.weight(*part)
                of_batch += weight
                with twice_differentiable(values_read=False) as weight_gradients:
                    loss = self.derivatives.loss(*part)
                    with weight_gradients.unread():
                        grads = self.derivatives.gradient(loss, create_graph=True)
                    products = self.derivatives.product(grads, along)
                add_weighted(total, products, weight)
                of_parts.append(loss.detach().double() * weight)
            if of_parts:
                losses.append(torch.stack(of_parts).sum() / of_batch)
            whole += of_batch
            count += size
        while graphs.kept:
            grads, _, _, weight = graphs.kept.popleft()
            whole += weight
            with twice_differentiable():  # checkpointed blocks run again
                products = self.derivatives.product(grads, along)
            add_weighted(total, products, weight)
        count, whole, _ = over_ranks(self.ranks, [total], count, whole)
        check_same_count(first["samples"], count)
        check_same_losses(self.losses, losses, self.derivatives.digits(), self.ranks)
        return self._named(scale(total, 1 / whole))

    def _single(self, batch: Batch, size: int, wanted: set[str]) -> dict[str, Any]:
        """One batch needs no second sweep: the graph of its gradient is differentiated again."""
        with twice_differentiable():
            loss = self.derivatives.loss(batch, size)
            grads = self.derivatives.gradient(loss, create_graph=True)
        g = taken(values := detached(grads), self.parameters)  # outside, where no operator is looked at
        with twice_differentiable():  # checkpointed blocks run again
            products = self.derivatives.product(grads, g)
        product, self.losses = taken(products, self.parameters, besides=g), [loss.detach()]
        self.derivatives.warn_unreached(self.names)
        sums: Sums = {kind: self._zeros() for kind in ("g2", "g2_sample") if kind in wanted}
        self._accumulate(sums, values, batch, size)
        self.of_samples.check(self.losses, self.ranks)
        whole = self.derivatives.weight(batch, size)
        means: Sums = {"g": g, "Hg": product, **{kind: scale(total, 1 / whole) for kind, total in sums.items()}}
        return self._fields(means, finite_mean_loss(self.losses, [size]), size)

    def _accumulate(self, sums: Sums, grads: Grads, batch: Batch, size: int) -> None:
        weight = self.derivatives.weight(batch, size)
        if "g" in sums:
            add_weighted(sums["g"], grads, weight)
        if "g2" in sums:
            add_weighted_squares(sums["g2"], grads, weight)
        if "g2_sample" in sums:
            with same_randomness(self.model):  # the second sweep draws for whole batches alone
                losses = self.squares.add(sums["g2_sample"], batch, size)
            if losses:
                self.of_samples.add(torch.stack(losses).sum() / weight, batch, size)

    def _fields(self, means: Sums, loss: float, samples: int) -> dict[str, Any]:
        moments = self.moments.means(self.ranks) if self.moments else {}
        return {kind: self._named(mean) for kind, mean in means.items()} | {**moments, "loss": loss, "samples": samples}

    def _zeros(self) -> list[Tensor]:
        return zero_sums(self.parameters, on_host=self.offload)

    def _named(self, values: Iterable[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.names, values, strict=True))

    def _shown(self, batches: Iterable[SizedBatch], total: int | None, name: str) -> Iterable[SizedBatch]:
        return with_progress(batches, total, name, self.progress)

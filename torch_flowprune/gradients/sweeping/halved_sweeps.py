"""g and H·g of all the data and of two halves of it, and the loss along a vector besides, in two sweeps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from itertools import chain, islice
from typing import Any, TypeAlias

import torch
from torch import Tensor

from torch_flowprune.gradients.batches import (
    MicroBatches,
    SizedBatch,
    add_weighted,
    check_read,
    check_runs_alone,
    check_same_count,
    check_same_losses,
    detached,
    finite_mean_loss,
    length_of,
    over_ranks,
    parts_that_run,
    scale,
)
from torch_flowprune.gradients.sweeping.curvature_check import check_curvature, check_is_due
from torch_flowprune.gradients.sweeping.products import AddPiece, Piece, Products, ProposedCut, Slopes
from torch_flowprune.inputs import Batch, Ranks, halves

Pairs: TypeAlias = "list[tuple[list[Tensor], list[Tensor]]]"  # a vector, and the sum that takes H times it

_ALL = 0  # a batch that counts for all the data; 1 and 2 count for a half
_SQUARES = {"g2", "g2_sample"}


class Portion:
    """Weighted sums over some of the batches, and what those count for; means, once they are over all ranks."""

    def __init__(self, sums: dict[str, list[Tensor]]) -> None:
        self.sums, self.samples, self.losses, self.weights = sums, 0, list[Tensor](), list[float]()
        self.weight = self.loss = 0.0

    def take(self, other: Portion) -> None:
        for kind, total in self.sums.items():
            add_weighted(total, other.sums[kind], 1.0)
        self.samples += other.samples
        self.losses += other.losses
        self.weights += other.weights

    def over(self, ranks: Ranks) -> None:
        loss = finite_mean_loss(self.losses, self.weights) if self.losses else 0.0
        counts = over_ranks(ranks, self.sums.values(), self.samples, sum(self.weights), loss)
        self.samples, self.weight, self.loss = counts
        for total in self.sums.values():
            scale(total, 1 / self.weight)


class HalvedSweeps(Products):
    """Over the data, and over its even and odd batches: of a single batch, its even and odd samples."""

    places: list[int]
    counted: int
    head: SizedBatch
    single: bool

    def fields(
        self,
        data: Iterable[Batch],
        kinds: set[str],
        over: set[str],
        cut: ProposedCut,
        cut_over: set[str],
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Those of the flow over all the data and over each half; those of a ``Prediction``, where something goes.

        Args:
            data: what can be read twice.
            kinds: what the halves are for: of g, g2, g2_sample and Hg. There are none, where it is empty.
            over: names of the parameters that the flow is over; a cut may be of others.
            cut: what is thought to be removed, if anything.
            cut_over: names of those that its expansions are over.
        """
        self.kinds = kinds
        with self._sound():
            portions = self._gradients(data)
            self.rewind()
            along = self._products(data, portions, over, cut, cut_over)
        return [self._of(portion, over) for portion in portions], along

    def _of(self, portion: Portion, over: set[str]) -> dict[str, Any]:
        named = {kind: self._named(total) for kind, total in portion.sums.items()}
        inside = {kind: {name: of[name] for name in self.names if name in over} for kind, of in named.items()}
        return {"loss": portion.loss, "samples": portion.samples, **inside}

    def _entries(self, data: Iterable[Batch]) -> Iterator[SizedBatch]:
        """The batches, and the halves of a single one; ``places`` says of each what it counts for."""
        head, stream = self._stream(data)
        check_read(len(head))
        self.head, self.places, self.counted, self.single = head[0], [], 0, len(head) == 1
        self.additivity.over |= self.single
        for index, (batch, size) in enumerate(chain(head, stream)):
            self.places.append(_ALL if self.single or not self.kinds else 1 + index % 2)
            self.counted += size
            yield batch, size
        for index, half in enumerate(halves(*head[0], self.source.batch_dim) if self.single and self.kinds else []):
            self.places.append(1 + index)
            yield half

    def _gradients(self, data: Iterable[Batch]) -> list[Portion]:
        """The gradients and their squares, of all and of the halves: of all alone, where nothing can be halved."""
        kinds = {"g", *(self.kinds & _SQUARES)}
        if "g2_sample" in kinds:
            check_runs_alone(self.model)
        portions = [Portion({kind: self._zeros() for kind in kinds}) for _ in range(3 if self.kinds else 1)]
        micro = MicroBatches(self.derivatives, {*kinds, "Hg"}, len(kinds) * len(portions))
        self.losses, weights = [], list[float]()
        shown = self._shown(self._entries(data), length_of(data), "gradient")
        for index, (batch, size) in enumerate(self.additivity.watched(shown)):
            portion = portions[self.places[index]]
            portion.samples += size
            if parts := micro.of(batch, size):
                with parts_that_run() if self.single and index else nullcontext():
                    portion.losses.append(self._gradient(portion.sums, (batch, size), parts, micro, None))
                portion.weights.append(self.derivatives.weight(batch, size))
                self.losses.append(portion.losses[-1])
                weights.append(portion.weights[-1])
        check_read(self.counted, weights)
        self.of_samples.check(self.losses, self.ranks)
        self.derivatives.warn_unreached(self.names)
        finite_mean_loss(self.losses, weights)  # names the batch of one that is not
        return self._over_ranks(portions)

    def _over_ranks(self, portions: list[Portion]) -> list[Portion]:
        whole, *parts = portions
        if self.places[0] != _ALL:
            for part in parts:
                whole.take(part)
        read = torch.tensor([float(sum(part.weights)) for part in parts], device=self.parameters[0].device)
        self.ranks.sum([read])
        known = [whole, *(parts if parts and bool(read.all()) else [])]
        for portion in known:
            portion.over(self.ranks)
        return known

    def _products(
        self,
        data: Iterable[Batch],
        portions: list[Portion],
        over: set[str],
        cut: ProposedCut,
        cut_over: set[str],
    ) -> dict[str, Any]:
        """H·g of each portion, into its sums; the expansions of a cut."""
        whole, *parts = portions
        curved = [whole, *(parts if "Hg" in self.kinds else [])]
        pairs = [(self._within(over, portion.sums["g"]), self._zeros()) for portion in curved]
        vector, product = self._vector(cut.removed), self._zeros()
        slopes = Slopes()

        def add(piece: Piece) -> None:
            place = self.places[piece.batch]
            of_all = place == _ALL or not self.single
            wanted = pairs[:1] * of_all + pairs[place : place + 1] * (place != _ALL)
            if cut.removed and of_all:
                slopes.add(piece, self._dot(vector, detached(piece.grads)))
                wanted.append((vector, product))
            for left, (along, total) in zip(reversed(range(len(wanted))), wanted, strict=True):
                values = self.derivatives.product(piece.grads, along, retain_graph=left > 0)
                add_weighted(total, values, piece.weight)

        self._again(data, whole, add, [*pairs, (vector, product)] if cut.removed else pairs)
        for portion, (_, total) in zip(curved, pairs, strict=True):
            portion.sums["Hg"] = scale(total, 1 / portion.weight)
        if check_is_due(self.source, len(self.losses), alone=self.ranks.alone):
            check_curvature(self.derivatives, self.names, pairs[0][0], *self.head, asked=self.source.check)
        if not cut.removed:
            return {}
        product = scale(product, 1 / whole.weight)
        g, along_cut = (self._within(cut_over, values) for values in (whole.sums["g"], product))
        error = self._standard_error(slopes)
        of_all = {"loss": whole.loss, "standard_error": error, "samples": whole.samples}
        return of_all | self._expansions(g, along_cut, vector, cut.masks)

    def _again(self, data: Iterable[Batch], whole: Portion, add: AddPiece, pairs: Pairs) -> None:
        """The second sweep, over what the first one read; halves of a single batch are left out, where none want it."""
        last = 1 if self.single and "Hg" not in self.kinds else None
        losses, weights = self._swept(islice(self._entries(data), last), length_of(data), add, 2 * len(pairs))
        count, _, _ = over_ranks(self.ranks, [total for _, total in pairs], self.counted, sum(weights))
        check_same_count(whole.samples, count)
        check_same_losses(self.losses, losses, self.derivatives.digits(), self.ranks)

    def _within(self, over: set[str], values: list[Tensor]) -> list[Tensor]:
        """0 for parameters that the flow is not over."""
        return [
            value if name in over else torch.zeros_like(value) for name, value in zip(self.names, values, strict=True)
        ]

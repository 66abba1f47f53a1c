"""Sweeps over the data of all ranks, of a model that they hold in parts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from torch_flowprune.gradients.batches import Grads, LossWeights, SizedBatch, add_weighted, dot_product, zero_sums
from torch_flowprune.gradients.flow_source import FlowSource
from torch_flowprune.gradients.sharding import Parts, ShardedDerivatives, ShardedModel, is_in_parts
from torch_flowprune.gradients.sweeping.products import Products, ProposedCut, Slopes, signs
from torch_flowprune.gradients.sweeping.sharded_moments import ShardedMoments
from torch_flowprune.inputs import Batch, Ranks, Restore, Target, local, same_randomness, samples, sized


def products_over(
    model: nn.Module, targets: Mapping[str, Target], source: FlowSource, rewind: Restore, ranks: Ranks
) -> Products:
    """The sweeps that fit the model: one that ranks hold in parts, or whole on each of them."""
    if is_in_parts(model):
        return ShardedProducts(model, targets, source, rewind)
    return Products(model, targets, source, rewind, ranks)


class ShardedProducts(Products):
    """This rank's parts of what sweeps give, and handed out as the parameters are."""

    derivatives: ShardedDerivatives

    def __init__(self, model: nn.Module, targets: Mapping[str, Target], source: FlowSource, rewind: Restore) -> None:
        self.sharded = ShardedModel(model, targets, under_masks=source.under_masks)
        leaves = [shard.leaf for shard in self.sharded.targets]
        parts = {name: replace(targets[name], parameter=leaf) for name, leaf in zip(targets, leaves, strict=True)}
        super().__init__(model, parts, source, rewind, self.sharded.ranks)
        self.holders = Ranks.holding(model.parameters())

    def _with(self, weights: LossWeights) -> ShardedDerivatives:
        source = self.source
        return ShardedDerivatives(
            self.sharded, self.parameters, source.objective, source.mode, source.resources, weights
        )

    def run(self, data: Iterable[Batch], wanted: set[str]) -> dict[str, Any]:
        self.derivatives.squares_wanted = "g2" in wanted
        fields = super().run(data, wanted)
        return {kind: self._handed_out(of) if isinstance(of, dict) else of for kind, of in fields.items()}

    def times(self, v: Mapping[str, Tensor], data: Iterable[Batch]) -> dict[str, Tensor]:
        shards = dict(zip(self.names, self.sharded.targets, strict=True))
        return self._handed_out(super().times({name: shards[name].own_part(value) for name, value in v.items()}, data))

    def diagonal(self, data: Iterable[Batch], probes: int) -> dict[str, Any]:
        fields = super().diagonal(data, probes)
        return {kind: self._handed_out(of) if isinstance(of, dict) else of for kind, of in fields.items()}

    def _seed(self) -> int:
        return int(self.holders.agreed(torch.tensor(super()._seed(), device="cpu")))

    def _signs(self, draw: torch.Generator) -> list[Tensor]:
        """Those of whole parameters, drawn on every rank, and of them its own."""
        return [shard.own_part(signs(shard.parameter, draw)).to(shard.leaf.dtype) for shard in self.sharded.targets]

    def _norm(self, values: Sequence[Tensor]) -> float:
        return float(self._dot(values, values).sqrt())

    def along(self, cut: ProposedCut, data: Iterable[Batch]) -> dict[str, Any]:
        parts = ({name: local(value) for name, value in of.items()} for of in (cut.removed, cut.masks))
        return super().along(ProposedCut(*parts), data)

    def _standard_error(self, slopes: Slopes) -> float:
        """Over the steps: their slopes are those of the sums over the ranks, and the same on each."""
        slopes.sums = {step: slope / self.sharded.ranks.count for step, slope in slopes.sums.items()}
        return slopes.standard_error(Ranks())

    def _dot(self, a: Sequence[Tensor], b: Sequence[Tensor | None]) -> Tensor:
        """Over the parts of all ranks, each once."""
        pairs = zip(a, b, self.sharded.targets, strict=True)
        counted = [(x, y) for x, y, shard in pairs if y is not None and self.holders.counts(shard.parameter)]
        own = dot_product(*map(list, zip(*counted, strict=True))) if counted else torch.zeros((), dtype=torch.float64)
        return self.holders.summed(own.to(self.parameters[0].device))

    def _handed_out(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: shard.handed_out(values[name])
            for name, shard in zip(self.names, self.sharded.targets, strict=True)
            if name in values
        }

    def _moments_of(self, kinds: set[str]) -> ShardedMoments:
        shards = dict(zip(self.names, self.sharded.targets, strict=True))
        return ShardedMoments(self.model, self.targets, self.source, kinds, self.sharded, shards, self.holders)

    @contextmanager
    def _sound(self) -> Iterator[None]:
        with super()._sound(), self.sharded.installed():
            yield

    def _stream(self, data: Iterable[Batch]) -> tuple[list[SizedBatch], Iterator[SizedBatch]]:
        own = sized(data, self.parameters[0].device, *self.source.counting_words)
        stream = self.derivatives.in_step(own)
        return list(islice(stream, 2)), stream

    def _second(self, *args: Any) -> dict[str, Tensor]:
        self.derivatives.squares_wanted = False
        return super()._second(*args)

    def _accumulate(self, sums: dict[str, list[Tensor]], grads: Grads, batch: Batch, size: int) -> None:
        """The squares of each rank's own gradient were taken on its way."""
        super()._accumulate({kind: total for kind, total in sums.items() if kind == "g"}, grads, batch, size)
        if "g2" in sums:
            self._add_squares(sums["g2"], batch, size)
        if "g2_sample" in sums:
            with same_randomness(self.model):  # the second sweep draws for whole batches alone
                self._add_samples(sums["g2_sample"], batch, size)

    def _add_squares(self, total: list[Tensor], batch: Batch, size: int) -> None:
        squares = [shard.squares for shard in self.sharded.targets]
        add_weighted(total, squares, self.derivatives.weight(batch, size))

    def _add_samples(self, total: list[Tensor], batch: Batch, size: int) -> None:
        """Squares of each sample's gradient, one sample of each rank at a time: a rank without one runs its batch."""
        own = [(one, 1) for one in samples(batch, size, self.source.batch_dim)] if size else [(batch, 0)]
        wanted, mean = self.derivatives.squares_wanted, torch.zeros((), dtype=torch.float64)
        for one, count in self.derivatives.in_step(own):
            self.derivatives.squares_wanted = True
            loss = self.derivatives.loss(one, count)
            self.derivatives.gradient(loss)
            self._add_squares(total, one, count)
            mean = mean + loss.detach().double().cpu() * self.derivatives.weight(one, count)
        self.derivatives.squares_wanted = wanted
        self.of_samples.add(mean / self.derivatives.weight(batch, size), batch, size)

    def _zeros(self) -> list[Tensor]:
        return Parts(zero_sums(self.parameters, on_host=False))

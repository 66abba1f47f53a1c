"""What each weight multiplies, of a model that ranks hold in parts: by their own samples, summed over ranks."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from torch_flowprune.gradients.flow_source import FlowSource
from torch_flowprune.gradients.sharding import Shard, ShardedModel
from torch_flowprune.gradients.sweeping.input_moments import InputMoments, SeenProducts
from torch_flowprune.inputs import Batch, Ranks, Target


class ShardedMoments(InputMoments):
    """E[x²], E|x| and E[x ≠ 0] at the weights of this rank's parts.

    A product is seen with the weight that it is made of: one that was gathered for it, or this rank's part under tensor
    parallelism. So sums are over the ranks that have other data, or the same weight.

    Args:
        model, targets, source, kinds: see :class:`InputMoments`; the targets' parameters are this rank's parts.
        sharded: the model, set up to run.
        shards: by the names of the targets.
        holders: all ranks.
    """

    def __init__(
        self, model: nn.Module, targets: Mapping[str, Target], source: FlowSource, kinds: Collection[str],
        sharded: ShardedModel, shards: Mapping[str, Shard], holders: Ranks,
    ) -> None:  # fmt: skip
        super().__init__(model, targets, source, kinds)
        self.sharded, self.shards, self.holders = sharded, shards, holders
        self._layouts = {name: shard.in_memory() for name, shard in shards.items()}

    def add(self, batch: Batch, size: int) -> None:
        """One more forward, of all ranks. With a closure's graph no module is run and undone: it would count twice."""
        with self.sharded.all_held():
            super().add(batch, size)

    @contextmanager
    def _watched(self, operands: SeenProducts) -> Iterator[None]:
        for name, shard in self.shards.items():
            shard.told = partial(self._gathered, operands, name)
        try:
            with operands:
                yield
        finally:
            for shard in self.shards.values():
                shard.told = None

    def _gathered(self, operands: SeenProducts, name: str, whole: Tensor) -> None:
        """For a while the module computes with these values."""
        operands.know(name, whole, for_good=False)
        self._layouts[name] = torch.empty_like(whole, device="meta")

    def _read(self, _: Ranks) -> list[str]:
        return super()._read(self.holders)

    def _mean(self, kind: str, name: str, _: Ranks) -> Tensor:
        shard, layout = self.shards[name], self._layouts[name]
        total, counts = self._totals(kind, name, torch.empty_like(layout, device=self.parameters[name].device))
        total, counts = (shard.part_of_sum(shard.summed_over_copies(value)) for value in (total, counts))
        return total.div_(counts.clamp_(min=1))

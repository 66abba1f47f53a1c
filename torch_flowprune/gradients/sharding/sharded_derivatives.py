"""The derivatives on one batch of each rank, which run the model together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from torch_flowprune.gradients.batches import Derivatives, Grads, LossWeights, Resources, SizedBatch
from torch_flowprune.gradients.sharding.data_ranks import DataRanks
from torch_flowprune.gradients.sharding.sharded_model import ShardedModel
from torch_flowprune.gradients.sharding.surroundings import Surroundings
from torch_flowprune.inputs import Batch, Objective, settle, tree_leaves


class Step(int):
    """The number of samples of a rank's batch, with what each rank's counts for in a step of all of them.

    Attributes:
        weight: the mean over ranks of what their batches count for.
        share: by how many times that this rank's counts.
    """

    weight: float
    share: float

    @classmethod
    def of(cls, size: int, own: float, ranks: DataRanks) -> Step:
        """Agreed with the other ranks."""
        step = cls(size)
        step.weight = ranks.total(own) / ranks.count
        step.share = own / step.weight if step.weight else 0.0
        return step


class ShardedDerivatives(Derivatives):
    """Of the sum of the ranks' losses, by this rank's parts of the parameters.

    Gradients are summed over ranks as they come, so that the batches of a step count alike, see :class:`Step`: the loss
    of each is multiplied by its share.
    """

    runs_alone = False

    def __init__(
        self,
        sharded: ShardedModel,
        parameters: Sequence[nn.Parameter],
        objective: Objective,
        mode: str,
        resources: Resources,
        weights: LossWeights,
    ) -> None:
        super().__init__(sharded.model, parameters, objective, mode, resources, weights)
        self.sharded, self.squares_wanted = sharded, False
        self._checked, self._last = False, cast("Batch | None", None)

    def in_step(self, batches: Iterable[SizedBatch]) -> Iterator[SizedBatch]:
        """As many on each rank, and what each counts for."""
        ranks = self.sharded.ranks
        for batch, size in ranks.in_step(batches):
            yield batch, Step.of(size, super().weight(batch, size) if size else 0.0, ranks)

    def weight(self, _: Batch, size: int) -> float:
        """What the batches of this step count for, each."""
        return _agreed(size).weight

    def loss(self, batch: Batch, size: int) -> Tensor:
        """Of this rank's batch, times its share."""
        share, before = _agreed(size).share, Surroundings(self.model)
        self.sharded.share = share if self.squares_wanted else None
        loss = self._of_share(batch, size, share)
        while self.sharded.holds_more():  # of what a user's function noted in that run nothing may be left
            before.restore()
            loss = self._of_share(batch, size, share)
        if not self._checked:
            self.sharded.check_reached(loss)
            self._checked = True
        return loss

    def _of_share(self, batch: Batch, size: int, share: float) -> Tensor:
        with self.sharded.held():
            if share:
                self._last = batch
                return super().loss(batch, size) * share
            if not size and self._last is not None:  # the data have ended
                return super().loss(self._last, 1) * 0.0
            return self._without_weight(batch)

    def gradient(self, loss: Tensor, **options: Any) -> Grads:
        """This rank's parts of the gradient of all ranks' losses."""
        for shard in self.sharded.targets:
            shard.squares = None
        grads = super().gradient(loss, **options)
        self.reached = [shard.reached for shard in self.sharded.targets]
        return grads

    def _without_weight(self, batch: Batch) -> Tensor:
        """0, of a run of the model in which the other ranks find this one: its own loss may be a mean over nothing."""
        settle(self.model, self.mode)
        with self.cast():
            output = self.objective.forward(self.model, batch)
        found = [one for one in tree_leaves(output) if isinstance(one, Tensor) and one.requires_grad]
        return torch.stack([(one * 0).sum() for one in found]).sum()


def _agreed(size: int) -> Step:
    if not isinstance(size, Step):
        raise TypeError(f"expected a batch of a step that all ranks take, got one of {size!r} samples")
    return size

"""The places of a model's part that hold parameters, and what stands there while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torch_flowprune.gradients.sharding.shards import Gathered, Shard
from torch_flowprune.torch_internals import list_flat_weights


class Owner(NamedTuple):
    """Where a module holds a parameter."""

    module: nn.Module
    key: str
    shard: Shard


class Holders:
    """All places of a model's part that hold parameters, and the parameters, each once."""

    def __init__(self, owners: Sequence[Owner]) -> None:
        self.owners = list(owners)
        self.shards = list({id(owner.shard): owner.shard for owner in owners}.values())
        modules = {id(owner.module): owner.module for owner in owners}.values()
        self._recurrent = [module for module in modules if isinstance(module, nn.RNNBase)]

    @contextmanager
    def filled(self, wholes: Sequence[Tensor]) -> Iterator[None]:
        """Inside, the modules hold these in place of their parameters."""
        of_shard = {id(shard): shard.in_module(whole) for shard, whole in zip(self.shards, wholes, strict=True)}
        kept = [module._parameters[key] for module, key, _ in self.owners]
        try:
            self._put([of_shard[id(shard)] for _, _, shard in self.owners])
            yield
        finally:
            self._put(kept)

    def gathered(self, share: float | None) -> list[Tensor]:
        """The whole parameters, as part of the graph where there is one.

        Where there is none they say all the same that they require a gradient: by that operators choose kernels.
        """
        if torch.is_grad_enabled():
            return [Gathered.apply(shard.leaf, shard, share) for shard in self.shards]
        return [shard.gathered(shard.leaf).requires_grad_(shard.leaf.requires_grad) for shard in self.shards]

    def _put(self, values: Sequence[Any]) -> None:
        for (module, key, _), value in zip(self.owners, values, strict=True):
            module._parameters[key] = value
        for layer in self._recurrent:
            list_flat_weights(layer)

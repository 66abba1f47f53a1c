"""Coupled channels of a model that ranks hold in parts, as candidates.

A channel is made of parts of several parameters, which lie on several ranks. So one group after the other is put
together, as a forward does, and each rank scores all of its channels: scores are as few as channels. Masks are cleared
where a rank has a part of what goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor

from torch_flowprune.inputs import Box, HeldUnits, PutTogether, Ranks
from torch_flowprune.scoring.candidates.group_units import GroupUnits


@dataclass(frozen=True, eq=False)
class ShardedGroup(GroupUnits):
    """The units of one coupled group, all of them on every rank."""

    ranks: Ranks = field(default_factory=Ranks)

    @property
    def shard(self) -> HeldUnits:
        size = (self.group.size,)
        return HeldUnits(size, Box((0,), size), self.ranks.are_first, self.ranks)

    @property
    def moves(self) -> bool:
        return True

    def rows(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return super().rows(PutTogether(tensors))

    def alive(self) -> Tensor | None:
        return self._left[0]

    def kept_weights(self, kept_units: int) -> Tensor | int:  # noqa: ARG002 - as of a group that is whole
        weights = self._left[1]  # which every rank helps to count
        return weights if self.ranks.are_first else 0

    @cached_property
    def _left(self) -> tuple[Tensor | None, Tensor | int]:
        """Which units the masks leave, and how many of their own weights: masks are put together for it once."""
        given = {name: target.mask for name, target in self.members.items() if target.mask is not None}
        masks = dict(PutTogether(given))
        members = {name: replace(target, mask=masks.get(name)) for name, target in self.members.items()}
        whole = GroupUnits(self.group, members, self.scored, None)
        return whole.alive(), whole.kept_weights(self.group.size)

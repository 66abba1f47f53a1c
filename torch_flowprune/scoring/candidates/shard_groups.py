"""Coupled channels, and whole blocks, of a model that ranks hold in parts, as candidates.

Such a unit is made of parts of several parameters, which lie on several ranks. So the parameters of one candidate after
the other are put together, as a forward does, and each rank scores all of its units: scores are as few as these. Masks
are cleared where a rank has a part of what goes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor

from torch_flowprune.inputs import Box, HeldUnits, PutTogether, Ranks, Target
from torch_flowprune.scoring.candidates.branch_units import BranchUnit
from torch_flowprune.scoring.candidates.candidate import Candidate, Whole
from torch_flowprune.scoring.candidates.group_units import GroupUnits


class _OnEveryRank(Whole, ABC):
    """All units of the candidate are on every rank, and what they hold is put together when it is read."""

    members: Mapping[str, Target]
    ranks: Ranks

    @abstractmethod
    def _with(self, members: Mapping[str, Target]) -> Candidate:
        """The candidate of a process that has all of these."""

    @property
    def shard(self) -> HeldUnits:
        size = (len(self),)  # type: ignore[arg-type]
        return HeldUnits(size, Box((0,), size), self.ranks.are_first, self.ranks)

    @property
    def moves(self) -> bool:
        return True

    def rows(self, tensors: Mapping[str, Tensor]) -> Tensor:
        found: Tensor = super().rows(PutTogether(tensors))  # type: ignore[misc]
        return found

    def alive(self) -> Tensor | None:
        return self._whole.alive()

    def kept_weights(self, kept_units: int) -> Tensor | int:
        weights = self._whole.kept_weights(kept_units)
        return weights if self.ranks.are_first else 0

    @cached_property
    def _whole(self) -> Candidate:
        """With masks that every rank helps to put together, once."""
        given = {name: target.mask for name, target in self.members.items() if target.mask is not None}
        masks = dict(PutTogether(given))
        return self._with({name: replace(target, mask=masks.get(name)) for name, target in self.members.items()})


@dataclass(frozen=True, eq=False)
class ShardedGroup(_OnEveryRank, GroupUnits):
    """The units of one coupled group."""

    ranks: Ranks = field(default_factory=Ranks)

    def _with(self, members: Mapping[str, Target]) -> GroupUnits:
        return GroupUnits(self.group, members, self.scored, None)


@dataclass(frozen=True, eq=False)
class ShardedBranch(_OnEveryRank, BranchUnit):
    """One branch."""

    ranks: Ranks = field(default_factory=Ranks)

    def _with(self, members: Mapping[str, Target]) -> BranchUnit:
        return BranchUnit(self.branch, members, self.read, None)

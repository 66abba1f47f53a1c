"""The units of a parameter of which this rank holds a part, or a replica, as candidates.

A cut that goes through units (the filters of a layer that is sharded by its inputs) is taken back along that axis
alone, one layer at a time; elsewhere nothing moves between ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from torch_flowprune.inputs import (
    Box,
    HeldUnits,
    Ranks,
    Target,
    alike,
    as_shard_of,
    box_of,
    box_under,
    is_sharded,
    laid,
    local,
    replicated,
    whole,
)
from torch_flowprune.scoring.candidates.candidate import Candidates
from torch_flowprune.scoring.candidates.parameter_units import ParameterUnits
from torch_flowprune.scoring.granularity import Blocks, Slices, Units, Weights, alive
from torch_flowprune.scoring.stacked import numbers


@dataclass(frozen=True, eq=False)
class ShardUnits(ParameterUnits):
    """The units of one parameter: how many there are is said of all, what they hold of those that are here."""

    ranks: Ranks

    @cached_property
    def _placements(self) -> tuple[Any, ...] | None:
        return _whole_units(self.target.parameter, self.units)

    @cached_property
    def shard(self) -> HeldUnits:
        return _portion(self.target.parameter, self.units, self._in_all, self._placements, self.ranks)

    @cached_property
    def _in_all(self) -> int:
        """Counted on a tensor of this shape without memory."""
        return len(self.units.rows(torch.empty(self.shape, device="meta")))

    @property
    def moves(self) -> bool:
        return self._placements is not None

    def __len__(self) -> int:
        return self._in_all

    def rows(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return self.units.rows(laid(as_shard_of(tensors[self.name], self.target.parameter), self._placements))

    def all_rows(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return self.units.rows(whole(tensors[self.name]).detach())

    def alive(self) -> Tensor | None:
        return self._alive

    @cached_property
    def _alive(self) -> Tensor | None:
        mask = self.target.mask
        if mask is None:
            return None
        if not self.moves:
            return alive(self.units, local(mask))
        as_numbers = alike(local(mask).to(torch.uint8), self.target.parameter)  # which all backends send
        return alive(self.units, laid(as_numbers, self._placements))

    def clear_removed(self, masks: dict[str, Tensor], keep: Tensor) -> None:
        """From flags of the units that are here to the mask of the part that is here."""
        parameter = self.target.parameter
        masks[self.name] = self._spread(keep) if is_sharded(parameter) else self.units.mask(keep, parameter.shape)

    def _spread(self, values: Tensor) -> Tensor:
        """From one value for each unit that is here to one for each weight, laid on the ranks as the parameter is."""
        parameter = self.target.parameter
        own = box_of(parameter)
        laid_out = own if self._placements is None else box_under(parameter, self._placements)
        every = self.units.mask(values, torch.Size(laid_out.size))
        return alike(own.inside(laid_out).of(every).clone(memory_format=torch.contiguous_format), parameter)

    def handed_out(self, scores: Tensor) -> Tensor:
        """Of the units that are here: where a unit is a weight, laid as the parameter is, else those of all units."""
        if not is_sharded(self.target.parameter):
            return scores
        return self._spread(scores) if isinstance(self.units, Weights | Blocks) else self.shard.gathered(scores)

    def kept_weights(self, kept_units: int) -> Tensor | int:
        """Of a part only: who asks adds them up."""
        if self.weights == len(self):
            return kept_units if self.ranks.are_first else 0
        counted = self.ranks.counts(self.target.parameter)
        if self.target.mask is None:
            return local(self.target.parameter).numel() if counted else 0
        return torch.count_nonzero(local(self.target.mask)) if counted else 0

    def renewed(self, known: Mapping[str, Target]) -> ShardUnits:
        return ShardUnits(known[self.name], self.units, self.ranks)


def _whole_units(parameter: Tensor, units: Units) -> tuple[Any, ...] | None:
    """The placements under which no unit of a sharded parameter is cut; None where it lies so already."""
    if not is_sharded(parameter):
        return None
    given: tuple[Any, ...] = tuple(parameter.placements)  # type: ignore[attr-defined]
    cut = [getattr(placement, "dim", None) for placement in given]
    if isinstance(units, Weights):
        return None
    if isinstance(units, Slices):
        through = {axis for axis in cut if axis is not None and axis != units.dim % parameter.dim()}
    elif isinstance(units, Blocks):
        through = {units.axis} & set(cut) if not _between_blocks(parameter, units, cut) else set()
    else:  # units of a user's own, or of grouped outputs, may lie in any way
        through = {axis for axis in cut if axis is not None}
    return replicated(parameter, through) if through else None


def _between_blocks(parameter: Any, units: Blocks, cut: list[int | None]) -> bool:
    """Whether the input axis is cut once at most, and between blocks: told by the layout, alike on all ranks."""
    along = [i for i, axis in enumerate(cut) if axis == units.axis]
    if not along:
        return True
    ranks = parameter.device_mesh.size(along[0])
    return len(along) == 1 and -(-parameter.shape[units.axis] // ranks) % units.m == 0


def _portion(
    parameter: Tensor, units: Units, count: int, placements: tuple[Any, ...] | None, ranks: Ranks
) -> HeldUnits:
    """Where the units that are here lie, of ``count`` in all, once the parameter lies by these placements."""
    box = box_of(parameter) if placements is None else box_under(parameter, placements)
    shape, counts = tuple(parameter.shape), ranks.counts(parameter, placements)
    if isinstance(units, Weights):
        return HeldUnits(shape, box, counts, ranks, frozenset(_axes_cut(parameter)))
    if isinstance(units, Blocks):
        grid = (*shape[: units.axis], *shape[units.axis + 1 :], shape[units.axis])
        return HeldUnits(grid, box.moved(units.axis), counts, ranks)
    if isinstance(units, Slices):
        axis = units.dim % len(shape)
        here = box.size[axis] if 0 not in (*box.size[:axis], *box.size[axis + 1 :]) else 0
        return HeldUnits((shape[axis],), Box((box.begin[axis],), (here,)), counts, ranks)
    return HeldUnits((count,), Box((0,), (count,)), counts, ranks)


def _axes_cut(parameter: Any) -> set[int]:
    """The axes along which ranks share a parameter."""
    if not is_sharded(parameter):
        return set()
    return {placement.dim for placement in parameter.placements if getattr(placement, "dim", None) is not None}


def ranks_of(candidates: Candidates) -> Ranks:
    """Those that hold parts of the candidates; this process alone where all is here."""
    return next((one.shard.ranks for one in candidates.values() if one.shard is not None), Ranks())


def all_living(candidates: Candidates, scores: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """Layer by layer the scores of the units that are left; of shards one layer is put together at a time."""
    for name, candidate in candidates.items():
        value, left, held = scores[name], candidate.alive(), candidate.shard
        if held is not None:
            value, left = held.gathered(value), None if left is None else held.gathered(left)
        yield value if left is None else value[left]


def totals(candidates: Candidates, flags: Sequence[Tensor | None]) -> list[int]:
    """How many units of each candidate have a flag (None: all), on all ranks together."""
    counts: list[Tensor | int] = []
    for one, flag in zip(candidates.values(), flags, strict=True):
        if one.shard is not None and not one.shard.counts:
            counts.append(0)
        else:
            every = len(one) if one.shard is None else len(one.shard)
            counts.append(every if flag is None else torch.count_nonzero(flag))
    return ranks_of(candidates).add_up(numbers(counts))


def lefts(candidates: Candidates) -> list[int]:
    """How many units of each candidate are left."""
    return totals(candidates, [candidate.alive() for candidate in candidates.values()])

"""Layers of whose scores each rank holds parts, read part by part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from torch_flowprune.inputs import HeldUnits, Ranks
from torch_flowprune.scoring import Computed, LayerScores, Stack, bases, numbers, parts_of, stacks
from torch_flowprune.selection.ranking.digit_search import keys_of
from torch_flowprune.selection.ranking.sampled_bracket import comparing_type


@dataclass(frozen=True)
class Threshold:
    """All below a value go, and of those equal to it all up to a place in the model (None: all).

    ``tied`` is how many of these stay.
    """

    value: float
    last: int | None
    tied: int


@dataclass(frozen=True)
class HeldLayers:
    """Each layer a stack of its own, with the part of it that is here."""

    laid: list[Stack]
    held: list[HeldUnits]

    @classmethod
    def of(cls, scores: Sequence[LayerScores], alive: Sequence[Tensor | None], held: Sequence[HeldUnits]) -> HeldLayers:
        return cls([stacks([one], [flags])[0] for one, flags in zip(scores, alive, strict=True)], list(held))

    @property
    def ranks(self) -> Ranks:
        return self.held[0].ranks

    @cached_property
    def counting(self) -> list[Stack]:
        """The same without candidates where another rank counts these units."""
        return [
            stack if portion.counts else Stack(stack.layers, (torch.zeros_like(stack.all_candidates()[0]),))
            for stack, portion in zip(self.laid, self.held, strict=True)
        ]

    @cached_property
    def begins(self) -> list[int]:
        """Where each layer begins among all units, in the order of the model."""
        return bases([portion.units for portion in self.held])

    @property
    def units(self) -> int:
        """How many there are on all ranks."""
        return self.begins[-1]

    @cached_property
    def dtype(self) -> torch.dtype:
        """That scores are compared in: known where a rank has no unit, too."""
        return comparing_type(stack.scores(0, 0).dtype for stack in self.laid)

    def all_candidates(self) -> list[Tensor]:
        """One flag a unit, by layer."""
        return [flags for stack in self.laid for flags in stack.all_candidates()]

    def candidates(self) -> list[int]:
        """How many each layer has, on all ranks together."""
        return self.total(self.all_candidates())

    def total(self, flags: Sequence[Tensor]) -> list[int]:
        """How many flags are set in each layer, on all ranks together."""
        counts = zip(self.held, numbers([torch.count_nonzero(flag) for flag in flags]), strict=True)
        return self.ranks.add_up([count if portion.counts else 0 for portion, count in counts])

    def odd(self) -> list[Computed]:
        """The layers that are not all finite here, and should be."""
        layers = [layer for stack in self.laid if stack.to_check for layer in stack.layers]
        return [layer for layer in layers if not layer.all().isfinite().all()]

    def keys(self) -> Iterator[Tensor]:
        """Those of the candidates that count here, part by part."""
        for i in range(len(self.laid)):
            yield from self.keys_in(i)

    def keys_in(self, i: int) -> Iterator[Tensor]:
        """Likewise of one layer."""
        for _, values in self._values(self.counting[i]):
            yield keys_of(values[~values.isnan()])

    def places(self, value: float) -> Iterator[Tensor]:
        """Where in the model the candidates that count here have this score, part by part."""
        for i in range(len(self.laid)):
            yield from self.places_in(i, value)

    def places_in(self, i: int, value: float) -> Iterator[Tensor]:
        """Likewise of one layer."""
        for start, values in self._values(self.counting[i]):
            yield self._place(i, (values == value).nonzero()[:, 0] + start)

    def kept(self, cuts: Sequence[Threshold]) -> list[Tensor]:
        """Flags of what stays, where each layer is cut at a threshold."""
        keeps = [flags for stack in self.laid for flags in stack.flags()]
        for i, (stack, cut) in enumerate(zip(self.laid, cuts, strict=True)):
            for start, values in self._values(stack):
                stays = values > cut.value
                if cut.last is not None:
                    same = (values == cut.value).nonzero()[:, 0]
                    stays[same] = self._place(i, same + start) > cut.last
                stack.put([keeps[i]], start, min(start + len(values), stack.units), stays)
        return keeps

    def _place(self, i: int, at: Tensor) -> Tensor:
        return self.begins[i] + self.held[i].numbers(at)

    def _values(self, stack: Stack) -> Iterator[tuple[int, Tensor]]:
        """Where each part begins, and its scores: nan where a unit is no candidate, and behind the last."""
        for _, start, stop in parts_of([stack]):
            yield start, stack.comparable(stack.scores(start, stop), self.dtype, start, stop)

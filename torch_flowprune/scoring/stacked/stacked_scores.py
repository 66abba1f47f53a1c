"""Scores of many layers laid end to end and read in parts: few operators, and nothing of the model's size stored.

Neighbouring layers whose units are alike form a *stack*. A part of it is a range of units, which knows no layer
borders: what the scores are computed from is stacked, and the measure runs once a part. Scores at hand are the special
case of a measure that returns what it is given.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, groupby
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from torch_flowprune.scoring.stacked.drawn_scores import DrawnScores
from torch_flowprune.torch_internals import foreach_copy_

WORD = 8
"""Flags that are looked at together, as one integer of 64 bits."""
_PART = (1 << 23) - (1 << 14)
"""Units read at once, at most: float32 scores stay below 32 MiB, from where malloc maps fresh pages each time."""


@dataclass(frozen=True, eq=False)
class Computed:
    """One layer's scores, computed where they are read.

    Attributes:
        name, label: what errors call the layer, and the measure.
        measure: from tensors ``(unit, element)``, named by ``needs``, to one score a unit; each unit by itself.
        needs: what the measure reads.
        rows: one of these tensors, or what is sliced as one is.
    """

    name: str
    label: str
    measure: Callable[..., Tensor]
    needs: tuple[str, ...]
    rows: Callable[[str], Tensor | DrawnScores]

    @cached_property
    def _look(self) -> tuple[int, tuple[object, ...]]:
        first = self.rows(self.needs[0])
        return first.shape[0], (first.device, first.dtype, first.shape[1:], self.measure)

    @property
    def units(self) -> int:
        """How many scores."""
        return self._look[0]

    @property
    def kind(self) -> tuple[object, ...]:
        """What layers of one stack have in common."""
        return self._look[1]

    def all(self) -> Tensor:
        """Every score, stored."""
        return self.measure(**{kind: self.rows(kind)[:] for kind in self.needs})


LayerScores: TypeAlias = Tensor | Computed


def as_given(scores: Tensor) -> Tensor:
    """The measure of scores at hand."""
    return scores


def _as_computed(values: LayerScores) -> Computed:
    """Scores at hand, seen as computed."""
    if isinstance(values, Computed):
        return values
    flat = values.detach().reshape(-1)
    return Computed("", "given", as_given, ("scores",), lambda _: flat)


@dataclass(frozen=True, eq=False)
class Stack:
    """Layers that are read as one; ``alive`` are the units that can be selected (None: all)."""

    layers: tuple[Computed, ...]
    alive: tuple[Tensor | None, ...]
    _buffers: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def ends(self) -> list[int]:
        """Where each layer ends."""
        return list(accumulate(layer.units for layer in self.layers))

    @property
    def units(self) -> int:
        return self.ends[-1]

    @property
    def device(self) -> torch.device:
        return self.layers[0].kind[0]  # type: ignore[return-value]

    @property
    def to_check(self) -> bool:
        """Whether these scores may turn out not to be finite; those at hand are as their giver wants them."""
        return self.layers[0].measure is not as_given

    def all_candidates(self) -> list[Tensor]:
        """One flag a unit, by layer."""
        return [self._alive(i).clone() for i in range(len(self.layers))]

    def flags(self) -> list[Tensor]:
        """Room for one flag a unit, each layer's in memory of its own."""
        return [torch.empty(layer.units, dtype=torch.bool, device=self.device) for layer in self.layers]

    def put(self, flags: list[Tensor], start: int, stop: int, part: Tensor) -> None:
        """The flags of a range of units to their layers."""
        pieces = [flags[i][where] for i, where in self._pieces(start, stop, 1)]
        foreach_copy_(pieces, list(part[: stop - start].split(list(map(len, pieces)))))

    def buffer(self, name: str, like: Tensor) -> Tensor:
        """Flags that the next part overwrites."""
        if name not in self._buffers or len(self._buffers[name]) < len(like):
            self._buffers[name] = torch.empty_like(like, dtype=torch.bool)
        return self._buffers[name][: len(like)]

    def scores(self, start: int, stop: int, step: int = 1) -> Tensor:
        """Those of a range of units, as the measure gives them; of scores at hand, until the next are read."""
        measure, needs = self.layers[0].measure, self.layers[0].needs
        pieces = list(self._pieces(start, stop, step)) or [(0, slice(0, 0))]
        return measure(
            **{kind: self._together(kind, [self.layers[i].rows(kind)[where] for i, where in pieces]) for kind in needs}
        )

    def comparable(self, scores: Tensor, dtype: torch.dtype, start: int, stop: int, step: int = 1) -> Tensor:
        """As :meth:`words`, and nan where a unit is no candidate."""
        scores, candidates = self.words(scores, dtype), self.candidates(start, stop, step)
        return scores if candidates is None else torch.where(candidates, scores, torch.nan)

    def words(self, scores: Tensor, dtype: torch.dtype) -> Tensor:
        """In one dtype, up to a whole number of words: nan, which no comparison selects, behind the last."""
        scores = scores.to(dtype)
        return pad(scores, (0, -len(scores) % WORD), value=torch.nan) if len(scores) % WORD else scores

    def candidates(self, start: int, stop: int, step: int = 1) -> Tensor | None:
        """One flag a unit of a range, up to a whole number of words; None where all units are candidates."""
        if all(alive is None for alive in self.alive):
            return None
        flags = self._together(
            "alive", [self._alive(i)[where] for i, where in self._pieces(start, stop, step)] or [self._alive(0)[:0]]
        )
        return pad(flags, (0, -len(flags) % WORD), value=False) if len(flags) % WORD else flags

    def _alive(self, i: int) -> Tensor:
        alive = self.alive[i]
        if alive is None:
            return torch.ones((), dtype=torch.bool, device=self.device).expand(self.layers[i].units)
        return alive.reshape(-1)

    def _together(self, kind: str, pieces: list[Tensor]) -> Tensor:
        """In a buffer that is kept: fresh memory costs more than what is done in it."""
        if len(pieces) == 1:
            return pieces[0]
        total = sum(map(len, pieces))
        if kind not in self._buffers or len(self._buffers[kind]) < total:
            self._buffers[kind] = pieces[0].new_empty(total, *pieces[0].shape[1:])
        return torch.cat(pieces, out=self._buffers[kind][:total])

    def _pieces(self, start: int, stop: int, step: int) -> Iterator[tuple[int, slice]]:
        """The range by layer; a step goes on over borders."""
        last = min(bisect_left(self.ends, stop), len(self.ends) - 1)
        for i in range(bisect_right(self.ends, start), last + 1):
            begin, end = self.ends[i] - self.layers[i].units, self.ends[i]
            first = start + -(-max(0, begin - start) // step) * step
            if first < min(stop, end):
                yield i, slice(first - begin, min(stop, end) - begin, step)


def stacks(scores: Sequence[LayerScores], alive: Sequence[Tensor | None]) -> list[Stack]:
    """All layers in their order, neighbours together where they are alike; layers without units are kept."""
    pairs = zip(map(_as_computed, scores), alive, strict=True)
    groups = [list(group) for _, group in groupby(pairs, key=lambda pair: pair[0].kind)]
    return [Stack(tuple(layer for layer, _ in group), tuple(flags for _, flags in group)) for group in groups]


def not_finite(measure: str, names: Sequence[str]) -> ValueError:
    """The error for layers whose scores cannot be ranked."""
    return ValueError(
        f"the {measure} scores of {', '.join(names[:5])} are not all finite: a weight or derivative there is nan or "
        "inf "
        "(check the weights and the data; try model.double())"
    )


def numbers(counts: Sequence[Tensor | int]) -> list[int]:
    """Counts as ints: 0-d tensors are read from their devices with one synchronisation a device."""
    known = {i: count for i, count in enumerate(counts) if not isinstance(count, Tensor)}
    pending = {i: count for i, count in enumerate(counts) if isinstance(count, Tensor)}
    for device in dict.fromkeys(count.device for count in pending.values()):
        here = [i for i, count in pending.items() if count.device == device]
        known.update(zip(here, torch.stack([pending[i] for i in here]).tolist(), strict=True))
    return [known[i] for i in range(len(counts))]


def part_size(units: int) -> int:
    """How many units are read at once: a 32nd of the model's, so that what a part needs is small beside the weights."""
    return max(_PART >> 7, min(_PART, units // 32 // WORD * WORD))


def read_on_host(tensors: Sequence[Tensor]) -> Tensor:
    """Small tensors end to end on the CPU, with one transfer for neighbours on one device."""
    if len(tensors) == 1:
        return tensors[0].cpu()
    runs = [torch.cat(list(run)).cpu() for _, run in groupby(tensors, key=lambda tensor: tensor.device)]
    return runs[0] if len(runs) == 1 else torch.cat(runs)


def bases(lengths: Sequence[int]) -> list[int]:
    """Where each begins, and the last ends, if all lie end to end."""
    return list(accumulate(lengths, initial=0))


def parts_of(laid: Sequence[Stack]) -> list[tuple[int, int, int]]:
    """Ranges of units that are read at once: stack, start, stop."""
    size = part_size(sum(stack.units for stack in laid))
    return [
        (i, start, min(start + size, stack.units))
        for i, stack in enumerate(laid)
        for start in range(0, stack.units, size)
    ]


def notes(
    laid: Sequence[Stack], parts: Sequence[tuple[int, int, int]], rooms: Sequence[int], width: int, dtype: torch.dtype
) -> tuple[Any, Any]:
    """Room for what is noted, by stack and by part.

    Taken part by part it would lie where the scores of the next part have to go.
    """
    split: list[list[int]] = [[] for _ in laid]
    for (i, _, _), room in zip(parts, rooms, strict=True):
        split[i].append(room)
    by_stack = [
        torch.empty(sum(own), width, dtype=dtype, device=stack.device) for own, stack in zip(split, laid, strict=True)
    ]
    by_part = [part for noted, own in zip(by_stack, split, strict=True) if own for part in noted.split(own)]
    return by_stack, by_part

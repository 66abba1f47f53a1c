"""A bracket around the k-th lowest score, from a sample; and one sweep over all scores, which notes what lies in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import gcd, inf, isqrt

import torch
from torch import Tensor

from torch_flowprune.scoring import WORD, Computed, Stack, bases, notes, numbers, parts_of, read_on_host

NARROW = (torch.float32, torch.bfloat16, torch.float16)
"""What float32 holds exactly; whole numbers it holds only to 2^24."""
_SMALLEST_SAMPLE = 1 << 14


def comparing_type(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype that scores of these dtypes are compared in."""
    return torch.float32 if all(dtype in NARROW for dtype in dtypes) else torch.float64


@dataclass(frozen=True)
class Sample:
    """Every ``step``-th score of each stack, on the host, in the dtype that all scores are compared in.

    ``first`` is where those of each stack begin.
    """

    values: Tensor
    first: list[int]
    step: int
    dtype: torch.dtype

    @classmethod
    def of(cls, laid: Sequence[Stack], units: int | None = None, dtype: torch.dtype | None = None) -> Sample:
        """A step that has no factor in common with the usual lengths of rows, so that it meets every column.

        ``units`` and ``dtype`` are those of all ranks, where others hold scores too.
        """
        units = sum(stack.units for stack in laid) if units is None else units
        step = max(1, units // max(_SMALLEST_SAMPLE, int(2 * units ** (2 / 3))))
        while gcd(step, 210) > 1:
            step += 1
        taken = [stack.scores(0, stack.units, step) for stack in laid]
        dtype = comparing_type(values.dtype for values in taken) if dtype is None else dtype
        values = [stack.comparable(some, dtype, 0, stack.units, step) for stack, some in zip(laid, taken, strict=True)]
        return cls(read_on_host(values), bases(list(map(len, values))), step, dtype)

    def bracket(self, share: float, width: int) -> tuple[float, float]:
        """Three standard deviations of the sample's rank to either side of the share that goes, times ``width``."""
        size = len(self.values) - int(torch.count_nonzero(self.values.isnan()))
        rank, margin = int(share * size), width * (int(3 * (size * share * (1 - share)) ** 0.5) + 2)
        low = self.values.kthvalue(rank - margin + 1).values.item() if rank >= margin else -inf  # nan counts as highest
        high = self.values.kthvalue(rank + margin + 1).values.item() if rank + margin < size else inf
        return low, high

    def rooms(self, parts: Sequence[tuple[int, int, int]], low: float, high: float, room: int) -> list[int]:
        """Room for the words of each part that hold scores between: ``room`` times what may be there, and one more.

        Of a part in which the sample met ``count`` of them there may be as many as would give such a sample at four
        standard deviations: count + 8 + 4 √(count + 4) of Poisson's law.
        """
        upto = torch.nn.functional.pad(((self.values > low) & (self.values < high)).cumsum(0), (1, 0))
        sampled = torch.tensor(
            [[self.first[i] - (-end // self.step) for end in ends] for i, *ends in parts],
            dtype=torch.int64,
            device="cpu",
        ).view(-1, 2)
        counts = upto[sampled].diff(dim=1)[:, 0].tolist()
        expected = [room * self.step * (count + 8 + 4 * isqrt(count + 4)) for count in counts]
        return [
            1 + min(-(-(stop - start) // WORD), most) for (_, start, stop), most in zip(parts, expected, strict=True)
        ]


@dataclass(frozen=True)
class Cut:
    """A selection.

    Attributes:
        keep: which units stay: bool tensors, one a layer, flat, on the scores' devices, each in memory of its own.
        kept: how many of each layer stay.
        threshold: the highest score that went; None where nothing did.
        tied: how many units stay although their score equals the threshold.
    """

    keep: list[Tensor]
    kept: list[int]
    threshold: float | None = None
    tied: int = 0


@dataclass(frozen=True)
class Swept:
    """What one pass over all scores found.

    Attributes:
        keep: what is above ``low``, one tensor a layer.
        above: how many of each layer.
        places: where the scores between ``low`` and ``high`` are, all layers end to end; on the host.
        values: these scores.
        complete: whether there was room for all of them.
        odd: the layers whose scores are not all finite, and should be.
    """

    keep: list[Tensor]
    above: list[int]
    places: Tensor
    values: Tensor
    complete: bool
    odd: list[Computed]


def sweep(laid: Sequence[Stack], sample: Sample, low: float, high: float, room: int) -> Swept:
    """One pass; the host waits for it at its end, and not before."""
    parts = parts_of(laid)
    keeps = [stack.flags() for stack in laid]
    rooms = sample.rooms(parts, low, high, room)
    words, word_parts = notes(laid, parts, rooms, 1, torch.int64)
    rows, row_parts = notes(laid, parts, rooms, WORD, sample.dtype)
    sums, sum_parts = notes(laid, parts, [1] * len(parts), 1, sample.dtype)
    for (i, start, stop), some_words, some_rows, total in zip(parts, word_parts, row_parts, sum_parts, strict=True):
        scores = laid[i].scores(start, stop)
        torch.sum(scores, 0, keepdim=True, dtype=sample.dtype, out=total[0])
        values, candidates = laid[i].words(scores, sample.dtype), laid[i].candidates(start, stop)
        above, inside = laid[i].buffer("above", values), laid[i].buffer("inside", values)
        torch.gt(values, low, out=above)
        if candidates is not None:  # flags, and what is noted, alone: selecting scores takes ten times a comparison
            above.bitwise_and_(candidates)
        torch.lt(values, high, out=inside).bitwise_and_(above)
        # More entries than there is room for leave no 0 at the end; the first may be word 0 or none: its scores tell.
        torch.nonzero_static(inside.view(torch.int64), size=len(some_words), fill_value=0, out=some_words)
        torch.index_select(values.view(-1, WORD), 0, some_words[:, 0], out=some_rows)
        if candidates is not None:
            some_rows.masked_fill_(~candidates.view(-1, WORD)[some_words[:, 0]], torch.nan)
        laid[i].put(keeps[i], start, stop, above)
    flags = [layer for keep in keeps for layer in keep]
    counts = numbers([torch.count_nonzero(layer) for layer in flags])
    noted, lengths = read_on_host(words)[:, 0], torch.tensor(rooms, dtype=torch.int64, device="cpu")
    ends, begins = lengths.cumsum(0), bases([stack.units for stack in laid])
    starts = torch.tensor([begins[i] + start for i, start, _ in parts], dtype=torch.int64, device="cpu")
    origins = starts.repeat_interleave(lengths)
    real = (noted > 0).index_fill_(0, ends - lengths, True)
    return Swept(
        flags,
        counts,
        *_between(noted, real, origins, read_on_host(rows), low, high),
        complete=not noted[ends - 1].any(),
        odd=_not_finite(laid, sums),
    )


def _between(
    words: Tensor, real: Tensor, origins: Tensor, rows: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """Of scores that were noted by the word: places and values of those between ``low`` and ``high``."""
    at = (rows.gt(low) & rows.lt(high) & real[:, None]).view(-1).nonzero()[:, 0]
    word = at // WORD
    return origins[word] + words[word] * WORD + at % WORD, rows.view(-1)[at]


def _not_finite(laid: Sequence[Stack], sums: Sequence[Tensor]) -> list[Computed]:
    """From the sums, which nan and inf show in; where one overflowed, each layer is looked at."""
    checked = [total for stack, total in zip(laid, sums, strict=True) if stack.to_check]
    if not checked or read_on_host(checked).isfinite().all():
        return []
    layers = [layer for stack in laid if stack.to_check for layer in stack.layers]
    return [layer for layer in layers if not layer.all().isfinite().all()]

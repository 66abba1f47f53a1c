"""The k lowest scores over many layers, exactly, in about one pass over them and without storing them.

Ties are broken in model order: of equal scores the one that comes first goes first, as a stable sort of all the scores
laid end to end would have it. The method is a sampled bracket: a deterministic sample of the scores gives two values
between which the k-th lies with near certainty; one sweep keeps what is above the lower and notes what is between,
which alone is ranked. Should the sample
mislead, the bracket is widened and swept again: the answer is exact in any case.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd, isqrt

import torch
from torch import Tensor

from torch_flowprune.scoring import WORD, Stack, Values, bases, not_finite, notes, on_host, parts_of, stacks

_SAMPLE = 1 << 14
_INF = float("inf")


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


def lowest(scores: Sequence[Values], k: int, alive: Sequence[Tensor | None] | None = None) -> Cut:
    """Exactly the ``k`` lowest go.

    Args:
        scores: one entry a layer: a tensor of any floating dtype and device without nan, where infinities compare as
            numbers do, or scores that are computed where they are read.
        k: how many go, over all layers.
        alive: which units are candidates (None: all); the others neither count nor stay.

    Raises:
        ValueError: if k is not between 0 and the number of candidates, or a computed score is not finite.
    """
    laid = stacks(scores, alive or [None] * len(scores))
    left = _left(laid)
    candidates = sum(left)
    if not 0 <= k <= candidates:
        raise ValueError(f"{k} units cannot go: there are {candidates} to choose from")
    if k == 0:
        return Cut([flags for stack in laid for flags in stack.left()], left)
    sample = _Sample.of(laid)
    trust = 1
    while True:
        low, high = sample.bracket(k / candidates, trust)
        swept = _sweep(laid, sample, low, high, trust)
        under = candidates - sum(swept.above)
        if swept.complete and under < k <= under + len(swept.values):
            return _cut_between(swept, k - under)
        cut = _cut_ties(laid, sample.dtype, k, low if k <= under else high)
        if cut is not None:
            return cut
        if swept.complete and (low, high) == (-_INF, _INF):
            raise ValueError("the scores hold nan: no order can be told")
        trust *= 8


def with_floors(
    scores: Sequence[Values], k: int, floors: Sequence[int], alive: Sequence[Tensor | None] | None = None
) -> Cut:
    """As :func:`lowest`, but of layer i at least ``floors[i]`` units stay (or all it has left, if fewer).

    Raises:
        ValueError: if the floors leave fewer than k to remove.
    """
    alive = alive or [None] * len(scores)
    left = _left(stacks(scores, alive))
    removable = [max(0, count - floor) for count, floor in zip(left, floors, strict=True)]
    if k > sum(removable):
        raise ValueError(
            f"{k} units should go, but min_keep leaves only {sum(removable)} of {sum(left)} removable: lower "
            "min_keep or the sparsity"
        )
    cuts: dict[int, Cut] = {}
    free = list(range(len(scores)))
    while (
        True
    ):  # a layer that would fall below its floor is cut to it exactly, and the rest of k is sought among the others
        cut = lowest([scores[i] for i in free], k, [alive[i] for i in free])
        below = [i for i, kept in zip(free, cut.kept, strict=True) if left[i] - kept > removable[i]]
        if not below:
            return _merged(cuts, free, cut)
        for i in below:
            cuts[i] = lowest([scores[i]], removable[i], [alive[i]])
            free.remove(i)
            k -= removable[i]


def _merged(floored: dict[int, Cut], free: Sequence[int], rest: Cut) -> Cut:
    parts = {i: (cut.keep[0], cut.kept[0]) for i, cut in floored.items()} | dict(
        zip(free, zip(rest.keep, rest.kept, strict=True), strict=True)
    )
    thresholds = [cut.threshold for cut in (rest, *floored.values()) if cut.threshold is not None]
    keep, kept = ([parts[i][which] for i in range(len(parts))] for which in (0, 1))
    return Cut(keep, kept, max(thresholds, default=None), rest.tied)  # type: ignore[arg-type]


def lowest_in_blocks(scores: Tensor, k: int, alive: Tensor | None = None) -> Tensor:
    """Which units stay when of every row of ``scores``, ``(block, unit)``, the k lowest go, the gone ones first."""
    order = scores.argsort(dim=-1, stable=True)
    if alive is not None:
        order = order.gather(-1, alive.gather(-1, order).to(torch.uint8).argsort(dim=-1, stable=True))
    keep = torch.ones_like(scores, dtype=torch.bool).scatter_(-1, order[:, :k], False)
    return keep if alive is None else keep & alive


def numbers(counts: Sequence[Tensor | int]) -> list[int]:
    """Counts as ints: 0-d tensors are read from their devices with one synchronisation a device."""
    found = {i: count for i, count in enumerate(counts) if not isinstance(count, Tensor)}
    pending = {i: count for i, count in enumerate(counts) if isinstance(count, Tensor)}
    for device in dict.fromkeys(count.device for count in pending.values()):
        here = [i for i, count in pending.items() if count.device == device]
        found.update(zip(here, torch.stack([pending[i] for i in here]).tolist(), strict=True))
    return [found[i] for i in range(len(counts))]


def _left(laid: Sequence[Stack]) -> list[int]:
    """How many candidates each layer has."""
    pairs = [(layer, alive) for stack in laid for layer, alive in zip(stack.layers, stack.alive, strict=True)]
    return numbers([layer.units if alive is None else torch.count_nonzero(alive) for layer, alive in pairs])


@dataclass(frozen=True)
class _Sample:
    """Every ``step``-th score of each stack, on the host, in the dtype that all scores are compared in.

    ``first`` is where those of each stack begin.
    """

    values: Tensor
    first: list[int]
    step: int
    dtype: torch.dtype

    @classmethod
    def of(cls, laid: Sequence[Stack]) -> _Sample:
        """A step that has no factor in common with the usual lengths of rows, so that it meets every column."""
        units = sum(stack.units for stack in laid)
        step = max(1, units // max(_SAMPLE, int(2 * units ** (2 / 3))))
        while gcd(step, 210) > 1:
            step += 1
        taken = [stack.scores(0, stack.units, step) for stack in laid]
        # float32 holds half precision exactly, whole numbers only to 2^24
        narrow = all(values.dtype in (torch.float32, torch.bfloat16, torch.float16) for values in taken)
        dtype = torch.float32 if narrow else torch.float64
        values = [stack.comparable(some, dtype, 0, stack.units, step) for stack, some in zip(laid, taken, strict=True)]
        return cls(on_host(values), bases(list(map(len, values))), step, dtype)

    def bracket(self, share: float, trust: int) -> tuple[float, float]:
        """Three standard deviations of the sample's rank to either side of the share that goes, times ``trust``."""
        size = len(self.values) - int(torch.count_nonzero(self.values.isnan()))
        rank, margin = int(share * size), trust * (int(3 * (size * share * (1 - share)) ** 0.5) + 2)
        low = (
            self.values.kthvalue(rank - margin + 1).values.item() if rank >= margin else -_INF
        )  # nan counts as highest
        high = self.values.kthvalue(rank + margin + 1).values.item() if rank + margin < size else _INF
        return low, high

    def rooms(self, parts: Sequence[tuple[int, int, int]], low: float, high: float, trust: int) -> list[int]:
        """Room for the words of each part that hold scores between: four deviations above what was sampled, and one."""
        upto = torch.nn.functional.pad(((self.values > low) & (self.values < high)).cumsum(0), (1, 0))
        sampled = torch.tensor(
            [[self.first[i] - (-end // self.step) for end in ends] for i, *ends in parts], dtype=torch.int64
        ).view(-1, 2)
        counts = upto[sampled].diff(dim=1)[:, 0].tolist()
        expected = [trust * self.step * (count + 4 * isqrt(count) + 4) for count in counts]
        return [
            1 + min(-(-(stop - start) // WORD), room) for (_, start, stop), room in zip(parts, expected, strict=True)
        ]


@dataclass(frozen=True)
class _Swept:
    """What one pass over all scores found.

    Attributes:
        keep: what is above ``low``, one tensor a layer.
        above: how many of each layer.
        places: where the scores between ``low`` and ``high`` are, all layers end to end; on the host.
        values: these scores.
        complete: whether there was room for all of them.
    """

    keep: list[Tensor]
    above: list[int]
    places: Tensor
    values: Tensor
    complete: bool


def _sweep(laid: Sequence[Stack], sample: _Sample, low: float, high: float, trust: int) -> _Swept:
    """One pass; the host waits for it at its end, and not before."""
    parts = parts_of(laid)
    keeps = [stack.flags() for stack in laid]
    rooms = sample.rooms(parts, low, high, trust)
    words, word_parts = notes(laid, parts, rooms, 1, torch.int64)
    rows, row_parts = notes(laid, parts, rooms, WORD, sample.dtype)
    sums, sum_parts = notes(laid, parts, [1] * len(parts), 1, sample.dtype)
    for (i, start, stop), some_words, some_rows, total in zip(parts, word_parts, row_parts, sum_parts, strict=True):
        scores = laid[i].scores(start, stop)
        torch.sum(scores, 0, keepdim=True, dtype=sample.dtype, out=total[0])
        values, left = laid[i].words(scores, sample.dtype), laid[i].candidates(start, stop)
        above, inside = laid[i].buffer("above", values), laid[i].buffer("inside", values)
        torch.gt(values, low, out=above)
        if left is not None:  # of flags and of what is noted alone: selecting scores takes ten times a comparison
            above.bitwise_and_(left)
        torch.lt(values, high, out=inside).bitwise_and_(above)
        # More entries than there is room for leave no 0 at the end; the first may be word 0 or none: its scores tell.
        torch.nonzero_static(inside.view(torch.int64), size=len(some_words), fill_value=0, out=some_words)
        torch.index_select(values.view(-1, WORD), 0, some_words[:, 0], out=some_rows)
        if left is not None:
            some_rows.masked_fill_(~left.view(-1, WORD)[some_words[:, 0]], torch.nan)
        laid[i].put(keeps[i], start, stop, above)
    _check_finite(laid, sums)
    flags = [layer for keep in keeps for layer in keep]
    counts = numbers([torch.count_nonzero(layer) for layer in flags])
    noted, lengths = on_host(words)[:, 0], torch.tensor(rooms)
    ends, begins = lengths.cumsum(0), bases([stack.units for stack in laid])
    origins = torch.tensor([begins[i] + start for i, start, _ in parts]).repeat_interleave(lengths)
    real = (noted > 0).index_fill_(0, ends - lengths, True)
    return _Swept(
        flags, counts, *_between(noted, real, origins, on_host(rows), low, high), complete=not noted[ends - 1].any()
    )


def _between(
    words: Tensor, real: Tensor, origins: Tensor, rows: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """Of scores that were noted by the word: places and values of those between ``low`` and ``high``."""
    at = (rows.gt(low) & rows.lt(high) & real[:, None]).view(-1).nonzero()[:, 0]
    word = at // WORD
    return origins[word] + words[word] * WORD + at % WORD, rows.view(-1)[at]


def _check_finite(laid: Sequence[Stack], sums: Sequence[Tensor]) -> None:
    """From the sums, which nan and inf show in; where one overflowed, each layer is looked at."""
    checked = [total for stack, total in zip(laid, sums, strict=True) if stack.to_check]
    if not checked or on_host(checked).isfinite().all():
        return
    layers = [layer for stack in laid if stack.to_check for layer in stack.layers]
    bad = [layer for layer in layers if not layer.all().isfinite().all()]
    if bad:
        raise not_finite(bad[0].label, [layer.name for layer in bad])


def _cut_between(swept: _Swept, k: int) -> Cut:
    """All up to ``low`` go, and of those between ``low`` and ``high`` the k lowest."""
    threshold = swept.values.kthvalue(k).values
    gone = swept.values <= threshold
    equal = (swept.values == threshold).nonzero()[:, 0]
    spared = equal[k - int(torch.count_nonzero(swept.values < threshold)) :]
    gone[spared] = False
    lost = swept.places[gone]
    begins = bases([len(keep) for keep in swept.keep])
    bounds = torch.searchsorted(lost, torch.tensor(begins)).tolist()
    within = lost - torch.tensor(begins[:-1]).repeat_interleave(torch.tensor(bounds).diff())
    for keep, first, last in zip(swept.keep, bounds, bounds[1:], strict=False):
        if first < last:
            keep.index_fill_(0, within[first:last].to(keep.device), False)
    kept = [above - last + first for above, first, last in zip(swept.above, bounds, bounds[1:], strict=False)]
    return Cut(swept.keep, kept, threshold.item(), len(spared))


def _cut_ties(laid: Sequence[Stack], dtype: torch.dtype, k: int, value: float) -> Cut | None:
    """All below ``value`` go, and of those equal to it the first ones; None where that cannot make k."""
    parts = parts_of(laid)

    def read(i: int, start: int, stop: int) -> Tensor:
        return laid[i].comparable(laid[i].scores(start, stop), dtype, start, stop)

    counts, count_parts = notes(laid, parts, [1] * len(parts), 2, torch.int64)
    for part, count in zip(parts, count_parts, strict=True):
        values = read(*part)
        count[0, 0].copy_(torch.count_nonzero(values < value))
        count[0, 1].copy_(torch.count_nonzero(values == value))
    lower, equal = on_host(counts).T.tolist()
    rest = k - sum(lower)
    if not 0 < rest <= sum(equal):
        return None
    keeps = [stack.flags() for stack in laid]
    tied = sum(equal) - rest
    for (i, start, stop), same in zip(parts, equal, strict=True):
        values = read(i, start, stop)
        gone = min(rest, same)
        stays = values > value if gone == same else values >= value
        if 0 < gone < same:
            stays[torch.nonzero_static(values == value, size=same)[:gone, 0]] = (
                False  # a known size: no synchronisation
            )
        laid[i].put(keeps[i], start, stop, stays)
        rest -= gone
    flags = [layer for keep in keeps for layer in keep]
    return Cut(flags, numbers([torch.count_nonzero(layer) for layer in flags]), value, tied)

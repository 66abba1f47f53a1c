"""The k lowest scores over many layers, exactly, in about one pass over them and without storing them.

Ties are broken in model order: of equal scores the one that comes first goes first, as a stable sort of all the scores
laid end to end would have it. The method is a sampled bracket: a deterministic sample of the scores gives two values
between which the k-th lies with near certainty; one sweep keeps what is above the lower and notes what is between,
which alone is ranked. Should the sample mislead, the bracket is widened and swept again: the answer is exact in any
case.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import torch
from torch import Tensor

from torch_flowprune.inputs import HeldUnits
from torch_flowprune.scoring import (
    LayerScores,
    Stack,
    bases,
    not_finite,
    notes,
    numbers,
    parts_of,
    read_on_host,
    stacks,
)
from torch_flowprune.selection.ranking.over_ranks import (
    count_over_ranks,
    lowest_of_each_over_ranks,
    lowest_over_ranks,
)
from torch_flowprune.selection.ranking.sampled_bracket import NARROW, Cut, Sample, Swept, sweep

_SMALL = 1 << 16
"""Units of a layer up to which what a cut costs is its operators, not its units."""


def lowest(
    scores: Sequence[LayerScores],
    k: int,
    alive: Sequence[Tensor | None] | None = None,
    held: Sequence[HeldUnits | None] | None = None,
) -> Cut:
    """Exactly the ``k`` lowest go.

    Args:
        scores: one entry a layer: a tensor of any floating dtype and device without nan, where infinities compare as
            numbers do, or scores that are computed where they are read.
        k: how many go, over all layers.
        alive: which units are candidates (None: all); the others neither count nor stay.
        held: where ranks hold parts of the layers, which parts these are; then every rank makes the same call, the k
            lowest are those of all ranks, and so are the counts.

    Raises:
        ValueError: if k is not between 0 and the number of candidates, or a computed score is not finite.
    """
    if (portions := _all_held(held)) is not None:
        return lowest_over_ranks(scores, k, alive or [None] * len(scores), portions)
    laid = stacks(scores, alive or [None] * len(scores))
    counts = _count_candidates(laid)
    candidates = sum(counts)
    if not 0 <= k <= candidates:
        raise ValueError(f"{k} units cannot be pruned: there are {candidates} to choose from")
    if k == 0:
        return Cut([flags for stack in laid for flags in stack.all_candidates()], counts)
    sample = Sample.of(laid)
    width = room = 1
    while True:
        low, high = sample.bracket(k / candidates, width)
        swept = sweep(laid, sample, low, high, room)
        if swept.odd:
            raise not_finite(swept.odd[0].label, [layer.name for layer in swept.odd])
        under = candidates - sum(swept.above)
        if swept.complete and under < k <= under + len(swept.values):
            return _cut_between(swept, k - under)
        cut = _cut_ties(laid, sample.dtype, k, low if k <= under else high)
        if cut is not None:
            return cut
        if swept.complete and (low, high) == (-inf, inf):
            raise ValueError("the scores hold nan: they cannot be ranked")
        if swept.complete or k <= under:
            width = _more(width)
        else:  # the bracket may well hold: what a retry needs besides stays small
            room = _more(room)


def _more(times: int) -> int:
    """Twice, which nearly always suffices, then by eights."""
    return 2 if times == 1 else 8 * times


def _all_held(held: Sequence[HeldUnits | None] | None) -> list[HeldUnits] | None:
    """The parts, of all layers or of none."""
    portions = [portion for portion in held or () if portion is not None]
    return portions or None


def lowest_of_each(
    scores: Sequence[LayerScores],
    ks: Sequence[int],
    alive: Sequence[Tensor | None],
    held: Sequence[HeldUnits | None] | None = None,
) -> list[Cut]:
    """Of each layer the k lowest, as :func:`lowest` of that layer alone; small layers of one size are cut together."""
    if (portions := _all_held(held)) is not None:
        return lowest_of_each_over_ranks(scores, ks, alive, portions)
    laid = [stacks([one], [flags])[0] for one, flags in zip(scores, alive, strict=True)]
    alike: dict[object, list[int]] = {}
    for i, stack in enumerate(laid):
        alike.setdefault((stack.layers[0].kind, stack.units) if 0 < stack.units <= _SMALL else i, []).append(i)
    cuts: dict[int, Cut] = {}
    for members in alike.values():
        together = max(1, _SMALL // max(1, laid[members[0]].units))
        for begin in range(0, len(members), together):
            some = members[begin : begin + together]
            cut = _cut_together([laid[i] for i in some], [ks[i] for i in some]) if len(some) > 1 else None
            cuts |= zip(some, cut or [lowest([scores[i]], ks[i], [alive[i]]) for i in some], strict=True)
    return [cuts[i] for i in range(len(scores))]


def _cut_together(laid: Sequence[Stack], ks: Sequence[int]) -> list[Cut] | None:
    """Layers as the rows of one tensor; None where one of them has an error to tell."""
    values = torch.stack([stack.scores(0, stack.units) for stack in laid])
    values = values.to(torch.float32 if values.dtype in NARROW else torch.float64)
    left = None
    if any(flags is not None for stack in laid for flags in stack.alive):
        left = torch.stack([stack.all_candidates()[0] for stack in laid])
    told = values.sum(-1).isfinite()  # nan and inf show in it; where it overflows, each layer is looked at by itself
    counts = told.new_full(told.shape, values.shape[1], dtype=torch.int64) if left is None else left.sum(-1)
    candidates, finite = torch.stack([counts, told]).tolist()
    if not all(finite) or not all(0 <= k <= count for k, count in zip(ks, candidates, strict=True)):
        return None
    values = values if left is None else torch.where(left, values, torch.nan)
    highest = torch.stack([row.kthvalue(max(k, 1)).values for row, k in zip(values, ks, strict=True)])[:, None]
    wanted = torch.tensor(ks, device=values.device)[:, None]
    equal, lower = values == highest, values < highest
    rest = (wanted - lower.sum(-1, keepdim=True)).clamp(min=0)
    gone = (lower | (equal & (equal.cumsum(-1) <= rest))) & (wanted > 0)
    keep = ~gone if left is None else left & ~gone
    thresholds, tied = highest[:, 0].tolist(), (equal.sum(-1) - rest[:, 0]).tolist()
    return [
        Cut([row.clone()], [count - k], threshold if k else None, ties if k else 0)
        for row, count, k, threshold, ties in zip(keep, candidates, ks, thresholds, tied, strict=True)
    ]


def with_floors(
    scores: Sequence[LayerScores],
    k: int,
    floors: Sequence[int],
    alive: Sequence[Tensor | None] | None = None,
    held: Sequence[HeldUnits | None] | None = None,
) -> Cut:
    """As :func:`lowest`, but of layer i at least ``floors[i]`` units stay (or all it has left, if fewer).

    Raises:
        ValueError: if the floors leave fewer than k to remove.
    """
    alive, held = alive or [None] * len(scores), held or [None] * len(scores)
    portions = _all_held(held)
    counts = _count_candidates(stacks(scores, alive)) if portions is None else count_over_ranks(scores, alive, portions)
    removable = [max(0, count - floor) for count, floor in zip(counts, floors, strict=True)]
    if k > sum(removable):
        raise ValueError(
            f"{k} units should be pruned, but min_keep leaves only {sum(removable)} of {sum(counts)} removable: lower "
            "min_keep or the sparsity"
        )
    cuts: dict[int, Cut] = {}
    free = list(range(len(scores)))
    # A layer that would fall below its floor is cut to it exactly, and the rest of k is sought among the others.
    while True:
        cut = lowest([scores[i] for i in free], k, [alive[i] for i in free], [held[i] for i in free])
        below = [i for i, kept in zip(free, cut.kept, strict=True) if counts[i] - kept > removable[i]]
        if not below:
            return _joined_cuts(cuts, free, cut)
        each = lowest_of_each(
            [scores[i] for i in below],
            [removable[i] for i in below],
            [alive[i] for i in below],
            [held[i] for i in below],
        )
        cuts |= zip(below, each, strict=True)
        free = [i for i in free if i not in cuts]
        k -= sum(removable[i] for i in below)


def _joined_cuts(floored: dict[int, Cut], free: Sequence[int], rest: Cut) -> Cut:
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


def tied_in_blocks(scores: Tensor, keep: Tensor, alive: Tensor | None = None) -> int:
    """How many units stay although their score equals the highest that went from their row."""
    gone = ~keep if alive is None else ~keep & alive
    highest = scores.masked_fill(~gone, -inf).amax(-1, keepdim=True)
    return int(torch.count_nonzero(keep & (scores == highest) & gone.any(-1, keepdim=True)))


def _count_candidates(laid: Sequence[Stack]) -> list[int]:
    """How many candidates each layer has."""
    pairs = [(layer, alive) for stack in laid for layer, alive in zip(stack.layers, stack.alive, strict=True)]
    return numbers([layer.units if alive is None else torch.count_nonzero(alive) for layer, alive in pairs])


def _cut_between(swept: Swept, k: int) -> Cut:
    """All up to ``low`` go, and of those between ``low`` and ``high`` the k lowest."""
    threshold = swept.values.kthvalue(k).values
    gone = swept.values <= threshold
    equal = (swept.values == threshold).nonzero()[:, 0]
    spared = equal[k - int(torch.count_nonzero(swept.values < threshold)) :]
    gone[spared] = False
    lost = swept.places[gone]
    begins = bases([len(keep) for keep in swept.keep])
    starts = torch.tensor(begins, device="cpu")
    places = torch.searchsorted(lost, starts)
    within, bounds = lost - starts[:-1].repeat_interleave(places.diff()), places.tolist()
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
    lower, equal = read_on_host(counts).T.tolist()
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

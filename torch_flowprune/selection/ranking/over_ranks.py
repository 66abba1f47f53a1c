"""Exactly the k lowest of scores that lie on many ranks: counts are added up, scores never travel.

As on one machine, a sample gives two values between which the k-th lies with near certainty, and one sweep notes what
is between; the k-th of that is found digit by digit. Of scores equal to it those that come first in the model go, found
in the same way by their places. What is sent does not depend on the size of the model, and what is decided is decided
by sums, so that ranks never part: a layer of which one rank alone has units is no other case.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import inf

import torch
from torch import Tensor

from torch_flowprune.inputs import HeldUnits
from torch_flowprune.scoring import Computed, LayerScores, bases, not_finite
from torch_flowprune.selection.ranking.digit_search import KEY_BITS, Found, key_of, keys_of, kth_of_each, value_of
from torch_flowprune.selection.ranking.held_layers import HeldLayers, Threshold
from torch_flowprune.selection.ranking.sampled_bracket import Cut, Sample, sweep

_FEW = 200
"""Of a smaller sample the bracket would be nearly as wide as the scores."""
_TOGETHER = 1 << 22
"""Units of layers that are searched together, at most: their keys are kept."""


def lowest_over_ranks(
    scores: Sequence[LayerScores], k: int, alive: Sequence[Tensor | None], held: Sequence[HeldUnits]
) -> Cut:
    """As :func:`~torch_flowprune.selection.ranking.lowest` of layers of which every rank holds parts."""
    layers = HeldLayers.of(scores, alive, held)
    counts = layers.candidates()
    _check_can_go(k, sum(counts))
    if k == 0:
        return Cut(layers.all_candidates(), counts)
    cut = _threshold(layers, k, sum(counts))
    keep = layers.kept([cut] * len(held))
    return Cut(keep, layers.total(keep), cut.value, cut.tied)


def lowest_of_each_over_ranks(
    scores: Sequence[LayerScores], ks: Sequence[int], alive: Sequence[Tensor | None], held: Sequence[HeldUnits]
) -> list[Cut]:
    """Of each layer the k lowest; small layers are searched together, a digit of all at once."""
    cuts: list[Cut] = []
    for some in _batches([portion.units for portion in held]):
        if some.stop - some.start == 1:
            cuts.append(lowest_over_ranks(scores[some], ks[some.start], alive[some], held[some]))
        else:
            cuts += _each(HeldLayers.of(scores[some], alive[some], held[some]), ks[some])
    return cuts


def count_over_ranks(
    scores: Sequence[LayerScores], alive: Sequence[Tensor | None], held: Sequence[HeldUnits]
) -> list[int]:
    """How many candidates each layer has, on all ranks together."""
    return HeldLayers.of(scores, alive, held).candidates()


def _batches(units: Sequence[int]) -> Iterator[slice]:
    """Neighbours that are small together, by how many units all ranks have of them: the same on every rank."""
    ends, start = bases(units), 0
    for i in range(1, len(units) + 1):
        if i == len(units) or ends[i + 1] - ends[start] > _TOGETHER:
            yield slice(start, i)
            start = i


def _check_can_go(k: int, candidates: int) -> None:
    if not 0 <= k <= candidates:
        raise ValueError(f"{k} units cannot be pruned: there are {candidates} to choose from")


def _check_all_finite(layers: HeldLayers, odd: Sequence[Computed]) -> None:
    """An error on every rank, where layers have scores that are not finite on some."""
    own = [layer for stack in layers.laid for layer in stack.layers]
    told = layers.ranks.add_up([int(any(layer is one for one in odd)) for layer in own])
    if bad := [layer for layer, count in zip(own, told, strict=True) if count]:
        raise not_finite(bad[0].label, [layer.name for layer in bad])


def _threshold(layers: HeldLayers, k: int, candidates: int) -> Threshold:
    """Where to cut for k to go: found in a bracket or, should that mislead, in all scores."""
    sample = Sample.of(layers.counting, layers.units, layers.dtype)
    low, high = _bracket(sample, k / candidates, layers)
    swept = sweep(layers.counting, sample, low, high, room=1)
    noted = [sum(swept.above), len(swept.values), int(not swept.complete), len(swept.odd)]
    above, between, cramped, odd = layers.ranks.add_up(noted)
    if odd:
        _check_all_finite(layers, swept.odd)
    under = candidates - above
    if not cramped and under < k <= under + between:
        found = _kth_between(layers, swept.values, k - under, low, high)
    else:
        (found,) = kth_of_each([layers.keys], [k], KEY_BITS[layers.dtype], layers.ranks)
        under = 0
    value, gone = value_of(found.value, layers.dtype), k - under - found.below
    if gone == found.equal:
        return Threshold(value, None, 0)
    (last,) = kth_of_each([lambda: layers.places(value)], [gone], layers.units.bit_length(), layers.ranks)
    return Threshold(value, last.value, found.equal - gone)


def _bracket(sample: Sample, share: float, layers: HeldLayers) -> tuple[float, float]:
    """As that of one machine, of the samples of all ranks; ends in float32, which three digits are enough for."""
    values = sample.values[~sample.values.isnan()].float()
    (size,) = layers.ranks.add_up([len(values)])
    if size < _FEW:
        return -inf, inf
    rank, margin = int(share * size), int(3 * (size * share * (1 - share)) ** 0.5) + 2
    keys = [keys_of(values)]
    ends = [min(max(rank - margin + 1, 1), size), min(rank + margin + 1, size)]
    low, high = (value_of(one.value, torch.float32) for one in kth_of_each([lambda: keys] * 2, ends, 32, layers.ranks))
    if layers.dtype is torch.float64:  # what was rounded lies within the next numbers of float32
        low, high = (
            float(torch.nextafter(torch.tensor(one), torch.tensor(to))) for one, to in ((low, -inf), (high, inf))
        )
    return low if rank >= margin else -inf, high if rank + margin < size else inf


def _kth_between(layers: HeldLayers, values: Tensor, k: int, low: float, high: float) -> Found:
    """Counted from the lower end, keys have fewer digits."""
    least, top = key_of(low, layers.dtype), key_of(high, layers.dtype)
    above = [keys_of(values) - (least - (1 << 64) if least >> 63 else least)]
    (found,) = kth_of_each([lambda: above], [k], (top - least).bit_length(), layers.ranks)
    return Found(found.value + least, found.below, found.equal)


def _each(layers: HeldLayers, ks: Sequence[int]) -> list[Cut]:
    for k, count in zip(ks, layers.candidates(), strict=True):
        _check_can_go(k, count)
    _check_all_finite(layers, layers.odd())
    cutting = [i for i, k in enumerate(ks) if k]
    keys = {i: list(layers.keys_in(i)) for i in cutting}
    found = kth_of_each(
        [lambda i=i: keys[i] for i in cutting],  # type: ignore[misc]
        [ks[i] for i in cutting],
        KEY_BITS[layers.dtype],
        layers.ranks,
    )
    cuts = {
        i: Threshold(value_of(one.value, layers.dtype), None, one.equal + one.below - ks[i])
        for i, one in zip(cutting, found, strict=True)
    }
    split = [i for i, cut in cuts.items() if cut.tied]
    gone = {i: ks[i] - one.below for i, one in zip(cutting, found, strict=True)}
    places = {i: list(layers.places_in(i, cuts[i].value)) for i in split}
    last = kth_of_each(
        [lambda i=i: places[i] for i in split],  # type: ignore[misc]
        [gone[i] for i in split],
        layers.units.bit_length(),
        layers.ranks,
    )
    cuts |= {i: Threshold(cuts[i].value, one.value, cuts[i].tied) for i, one in zip(split, last, strict=True)}
    keeps = layers.kept([cuts.get(i, Threshold(-inf, -1, 0)) for i in range(len(ks))])
    return [
        Cut([keep], [kept], cuts[i].value if i in cuts else None, cuts[i].tied if i in cuts else 0)
        for i, (keep, kept) in enumerate(zip(keeps, layers.total(keeps), strict=True))
    ]

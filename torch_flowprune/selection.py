"""The k lowest scores over many tensors, exactly, without concatenating them.

Ties are broken in model order: of equal scores the one that comes first goes first, as a stable sort of all the scores laid end to
end would have it. The method is a sampled bracket: a deterministic sample of the scores gives two values between which the k-th lies
with near certainty; one pass counts what is below and what is between; only what is between is ranked. Should the sample mislead, the
bracket is widened: the answer is exact in any case.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_SAMPLE = 1 << 16
_INF = float("inf")


@dataclass(frozen=True)
class Cut:
    """A selection.

    Attributes:
        keep: which units stay: bool tensors, one a layer, flat, on the scores' devices.
        threshold: the highest score that went; None where nothing did.
        tied: how many units stay although their score equals the threshold.
    """

    keep: list[Tensor]
    threshold: float | None = None
    tied: int = 0


def lowest(scores: Sequence[Tensor], k: int, alive: Sequence[Tensor | None] | None = None) -> Cut:
    """Exactly the ``k`` lowest go.

    Args:
        scores: one tensor a layer, any floating dtype and device, no nan; infinities compare as numbers do.
        k: how many go, over all tensors.
        alive: which units are candidates (None: all); the others neither count nor stay.

    Raises:
        ValueError: if k is not between 0 and the number of candidates.
    """
    alive = alive or [None] * len(scores)
    candidates = sum(_left(scores, alive))
    if not 0 <= k <= candidates:
        raise ValueError(f"{k} units cannot go: there are {candidates} to choose from")
    values = _comparable(scores, alive)
    if k == 0:
        return Cut([~layer.isnan() for layer in values])
    return _cut(values, k, _bracket(values, k, candidates))


def with_floors(scores: Sequence[Tensor], k: int, floors: Sequence[int], alive: Sequence[Tensor | None] | None = None) -> Cut:
    """As :func:`lowest`, but of layer i at least ``floors[i]`` units stay (or all it has left, if fewer): the k lowest of the others go.

    Raises:
        ValueError: if the floors leave fewer than k to remove.
    """
    alive = alive or [None] * len(scores)
    left = _left(scores, alive)
    removable = [max(0, count - floor) for count, floor in zip(left, floors, strict=True)]
    if k > sum(removable):
        raise ValueError(f"{k} units should go, but min_keep leaves only {sum(removable)} of {sum(left)} removable: lower min_keep or the sparsity")
    cuts: dict[int, Cut] = {}
    free = list(range(len(scores)))
    while True:  # a layer that would fall below its floor is cut to it exactly, and the rest of k is sought among the others
        cut = lowest([scores[i] for i in free], k, [alive[i] for i in free])
        kept = dict(zip(free, numbers([torch.count_nonzero(keep) for keep in cut.keep]), strict=True))
        below = [i for i in free if left[i] - kept[i] > removable[i]]
        if not below:
            return _merged(cuts, dict(zip(free, cut.keep, strict=True)), cut)
        for i in below:
            cuts[i] = lowest([scores[i]], removable[i], [alive[i]])
            free.remove(i)
            k -= removable[i]


def _merged(floored: dict[int, Cut], keeps: dict[int, Tensor], rest: Cut) -> Cut:
    keeps = keeps | {i: cut.keep[0] for i, cut in floored.items()}
    thresholds = [cut.threshold for cut in (rest, *floored.values()) if cut.threshold is not None]
    return Cut([keeps[i] for i in range(len(keeps))], max(thresholds, default=None), rest.tied)


def _left(scores: Sequence[Tensor], alive: Sequence[Tensor | None]) -> list[int]:
    return numbers([values.numel() if mask is None else torch.count_nonzero(mask) for values, mask in zip(scores, alive, strict=True)])


def lowest_in_blocks(scores: Tensor, k: int, alive: Tensor | None = None) -> Tensor:
    """Which units stay when in every row of ``scores``, shape ``(block, unit)``, the k lowest go, units already gone among them first."""
    order = scores.argsort(dim=-1, stable=True)
    if alive is not None:
        order = order.gather(-1, alive.gather(-1, order).to(torch.uint8).argsort(dim=-1, stable=True))
    keep = torch.ones_like(scores, dtype=torch.bool).scatter_(-1, order[:, :k], False)
    return keep if alive is None else keep & alive


@dataclass(frozen=True)
class _Bracket:
    """The k-th lowest score is sought from ``low`` to ``high``."""

    low: float
    high: float


def _comparable(scores: Sequence[Tensor], alive: Sequence[Tensor | None]) -> list[Tensor]:
    """Flat, in one dtype (float32 holds half precision exactly, whole numbers only to 2^24); nan, never selected, where a unit is no candidate."""
    narrow = (torch.float32, torch.bfloat16, torch.float16)
    wide = torch.float32 if all(values.dtype in narrow for values in scores) else torch.float64
    flat = [values.detach().reshape(-1).to(wide) for values in scores]
    return [values if left is None else values.masked_fill(~left.reshape(-1), torch.nan) for values, left in zip(flat, alive, strict=True)]


def numbers(counts: Sequence[Tensor | int]) -> list[int]:
    """Counts as ints: 0-d tensors are read from their devices with one synchronisation a device."""
    found = {i: count for i, count in enumerate(counts) if not isinstance(count, Tensor)}
    pending = {i: count for i, count in enumerate(counts) if isinstance(count, Tensor)}
    for device in dict.fromkeys(count.device for count in pending.values()):
        here = [i for i, count in pending.items() if count.device == device]
        found.update(zip(here, torch.stack([pending[i] for i in here]).tolist(), strict=True))
    return [found[i] for i in range(len(counts))]


def _on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Small tensors on the CPU, with one transfer a device."""
    return _moved(tensors, [torch.device("cpu")] * len(tensors))


def _on_devices(tensors: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """Small tensors from the CPU on the devices of others, with one transfer a device."""
    return _moved(tensors, [other.device for other in like])


def _moved(tensors: Sequence[Tensor], devices: Sequence[torch.device]) -> list[Tensor]:
    routes = [(tensor.device, device) for tensor, device in zip(tensors, devices, strict=True)]
    found: dict[int, Tensor] = {}
    for route in dict.fromkeys(routes):
        here = [i for i, other in enumerate(routes) if other == route]
        together = torch.cat([tensors[i] for i in here]).to(route[1])
        found.update(zip(here, together.split([len(tensors[i]) for i in here]), strict=True))
    return [found[i] for i in range(len(tensors))]


def _bracket(scores: list[Tensor], k: int, candidates: int) -> _Bracket:
    """Six standard deviations of the sample's rank to either side of k."""
    if candidates <= _SAMPLE:
        return _Bracket(-_INF, _INF)
    stride = max(1, sum(map(torch.numel, scores)) // _SAMPLE)
    sample = torch.cat(_on_host([values[::stride] for values in scores]))
    sample = sample[~sample.isnan()].sort().values
    share, size = k / candidates, len(sample)
    if size < 2:
        return _Bracket(-_INF, _INF)
    margin = int(6 * (size * share * (1 - share)) ** 0.5) + 2
    rank = int(share * size)
    low = sample[rank - margin].item() if rank >= margin else -_INF
    high = sample[rank + margin].item() if rank + margin < size else _INF
    return _Bracket(low, high)


def _cut(scores: list[Tensor], k: int, bracket: _Bracket) -> Cut:
    low, high = bracket.low, bracket.high
    to_low, to_high = _counts(scores, lambda values: values <= low), _counts(scores, lambda values: values < high)
    if k <= sum(to_low):
        under = sum(_counts(scores, lambda values: values < low))
        return _cut(scores, k, _Bracket(-_INF, low)) if k <= under else _cut_ties(scores, k - under, low)
    if k > sum(to_high):
        over = k > sum(_counts(scores, lambda values: values <= high))
        return _cut(scores, k, _Bracket(high, _INF)) if over else _cut_ties(scores, k - sum(to_high), high)
    between = [under - upto for under, upto in zip(to_high, to_low, strict=True)]
    return _cut_between(scores, k - sum(to_low), bracket, between)


def _counts(scores: list[Tensor], condition: Callable[[Tensor], Tensor]) -> list[int]:
    return numbers([torch.count_nonzero(condition(values)) for values in scores])


def _cut_ties(scores: list[Tensor], k: int, value: float) -> Cut:
    """All below ``value`` go, and of those equal to it the first k."""
    keeps = []
    equal = _counts(scores, lambda values: values == value)
    tied = sum(equal) - k
    for values, count in zip(scores, equal, strict=True):
        keep = values >= value
        gone = min(k, count)
        if gone:
            keep[torch.nonzero_static(values == value, size=count)[:gone, 0]] = False  # a known size: no synchronisation
        k -= gone
        keeps.append(keep)
    return Cut(keeps, value, tied)


def _cut_between(scores: list[Tensor], k: int, bracket: _Bracket, between: Sequence[int]) -> Cut:
    """All up to ``low`` go, and of those strictly between ``low`` and ``high`` the k lowest."""
    where = [
        torch.nonzero_static((values > bracket.low) & (values < bracket.high), size=count)[:, 0]
        for values, count in zip(scores, between, strict=True)
    ]
    gathered = torch.cat(_on_host([values[index] for values, index in zip(scores, where, strict=True)]))
    threshold = gathered.kthvalue(k).values
    stays = gathered > threshold
    equal = (gathered == threshold).nonzero()[:, 0]
    spared = equal[k - int(torch.count_nonzero(gathered < threshold)) :]
    stays[spared] = True
    keeps = []
    for values, index, staying in zip(scores, where, _on_devices(stays.split(list(between)), scores), strict=True):
        keep = values > bracket.low
        keep[index] = staying
        keeps.append(keep)
    return Cut(keeps, threshold.item(), len(spared))

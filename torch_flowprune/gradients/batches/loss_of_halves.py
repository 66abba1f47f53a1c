"""Whether the loss of a batch is what those of its halves make: a mean over what it is thought to be one over."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress

from torch_flowprune.gradients.batches.batch_derivatives import Derivatives
from torch_flowprune.gradients.batches.batch_streams import SizedBatch
from torch_flowprune.inputs import Batch, Ranks, parts, same_randomness, spread_out, untouched, users_level

_TRIED = 8
"""Samples of a batch, from all over it."""
_CANCELLED = 1e-2
"""Losses below are no smaller to rounding: of one that is 0 as what it is made of cancels, that is all there is."""


def difference_of_halves(derivatives: Derivatives, batch: Batch, size: int) -> tuple[float, float] | None:
    """The loss of a batch, and what those of its halves make of it, where these differ by more than rounding."""
    with untouched(derivatives.model):
        halves = [
            (half, count, weight)
            for half, count in parts(batch, size, -(-size // 2), derivatives.weights.along)
            if (weight := derivatives.weight(half, count))
        ]
        if not halves:
            return None
        value = _number(derivatives, batch, size)
        numbers = [_number(derivatives, half, count) for half, count, _ in halves]
    weights = [weight for _, _, weight in halves]
    mean = sum(number * weight for number, weight in zip(numbers, weights, strict=True)) / sum(weights)
    narrow = derivatives.resources.autocast or min(p.element_size() for p in derivatives.parameters) < 4
    tolerance = (2e-2 if narrow else 1e-4) * max(_CANCELLED, *map(abs, (value, *numbers)))
    return None if abs(value - mean) <= tolerance else (value, mean)


def warn_unless_mean(derivatives: Derivatives, head: Sequence[SizedBatch], ranks: Ranks) -> None:
    """Say that a loss, of which nothing tells what it is a mean over, is none over samples, by which batches count.

    Of a single batch it does not matter.
    """
    if not head or (len(head) == 1 and ranks.alone) or not derivatives.runs_alone:
        return
    batch, size = head[0]
    if derivatives.mode != "eval" or size < 2 or not derivatives.weights.are_supposed(batch, size):
        return
    count = min(size, _TRIED)
    try:
        few = spread_out(batch, size, count, derivatives.weights.along)
    except ValueError:  # one that cannot be cut
        return
    difference = None
    with untouched(derivatives.model, mode=derivatives.mode), suppress(Exception):  # the code may know its batch's size
        difference = difference_of_halves(derivatives, few, count)
        if difference is None or _draws(derivatives, few, count):
            return
    if difference is None:
        return
    warnings.warn(
        f"batches count by their samples, as if the loss were a mean over these: that of {count} samples of the first "
        f"batch is {difference[0]:.6g}, from its halves {difference[1]:.6g}. Say what it is with reduction=: 'sum', "
        "'token' (what of the target is not -100), a function that gives how many a batch's loss is a mean over; or "
        "'mean', where samples are to count all the same",
        UserWarning,
        stacklevel=users_level(),
    )


def _draws(derivatives: Derivatives, batch: Batch, size: int) -> bool:
    """Whether the loss is another each time, as one that samples is: then its halves tell nothing."""
    with same_randomness(derivatives.model):
        first, second = (_number(derivatives, batch, size) for _ in range(2))
    return first != second


def _number(derivatives: Derivatives, batch: Batch, size: int) -> float:
    with derivatives.cast():
        return derivatives.weights.mean(derivatives.objective.number_alone(derivatives.model, batch), size).item()

"""Whether the loss of samples is what those of their parts make: a mean over what it is thought to be one over."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress

from torch_flowprune.gradients.batches.batch_derivatives import Derivatives
from torch_flowprune.gradients.batches.batch_streams import SizedBatch
from torch_flowprune.inputs import Batch, Ranks, as_one, parts, same_randomness, spread_out, untouched, users_level

_TRIED = 4
"""Samples of a batch, from all over it."""
_CANCELLED = 1e-2
"""Losses below are no smaller to rounding: of one that is 0 as what it is made of cancels, that is all there is."""


def difference_of_halves(derivatives: Derivatives, batch: Batch, size: int) -> tuple[float, float] | None:
    """The loss of a batch, and what those of its halves make of it, where these differ by more than rounding.

    Not of a loss that is another each time: of that, halves tell nothing.
    """
    return _difference(derivatives, (batch, size), _halves(derivatives, [(batch, size)]))


class Additivity:
    """Watches the batches of a sweep for a loss that is no mean over samples, by which they count.

    Only where nothing tells what the loss is a mean over, and it matters, which is of several batches.
    """

    def __init__(self, derivatives: Derivatives, ranks: Ranks) -> None:
        self.derivatives, self.ranks = derivatives, ranks
        self.over = not derivatives.runs_alone or derivatives.mode != "eval"

    def watched(self, batches: Iterable[SizedBatch]) -> Iterator[SizedBatch]:
        """The batches, on a first sweep alone with a look at some of them: at the 2nd, the 4th, the 8th and so on.

        A few of its samples are joined with some of the first batch. Classes may come one after the other, and among
        samples that weigh alike no weights are seen.
        """
        first: SizedBatch | None = None
        for number, (batch, size) in enumerate(batches, 1):
            if not self.over and not number & (number - 1):
                few = self._few(batch, size)
                if few is None or not self.derivatives.weights.are_supposed(batch, size):
                    self.over = True
                elif first is not None:
                    self.over = self._told([first, few])
                elif not self.ranks.alone:
                    self.over = self._told([few])
                first = first or few
            yield batch, size
        self.over = True

    def _few(self, batch: Batch, size: int) -> SizedBatch | None:
        """None of a batch that cannot be cut."""
        count = min(size, _TRIED)
        with suppress(ValueError):
            return spread_out(batch, size, count, self.derivatives.weights.along), count
        return None

    def _told(self, samples: Sequence[SizedBatch]) -> bool:
        """Whether a warning was due: of the samples in one batch, or of each batch's where they do not go together."""
        along = self.derivatives.weights.along
        pieces = _halves(self.derivatives, samples)
        wholes = [(one, _halves(self.derivatives, [one])) for one in samples]
        if len(samples) == 2:
            (one, its_size), (other, size) = samples
            with suppress(ValueError, RuntimeError):
                wholes = [((as_one(one, other, (its_size, size), along), its_size + size), pieces)]
        for whole, of_it in wholes:
            difference = None
            with suppress(Exception):  # the code may know its batch's size
                difference = _difference(self.derivatives, whole, of_it)
            if difference is not None:
                _warn(whole[1], *difference)
                return True
        return False


def _warn(count: int, value: float, mean: float) -> None:
    warnings.warn(
        f"batches are weighted by their samples, as if the loss were a mean over these: that of {count} samples is "
        f"{value:.6g}, from its parts {mean:.6g}. Say how it reduces a batch: reduction='sum', 'token' (targets that "
        "are not -100), a function that returns how many terms a batch's loss is the mean of, or 'mean' to weight by "
        "samples all the same",
        UserWarning,
        stacklevel=users_level(),
    )


def _halves(derivatives: Derivatives, batches: Iterable[SizedBatch]) -> list[SizedBatch]:
    along = derivatives.weights.along
    return [half for batch, size in batches for half in parts(batch, size, -(-size // 2), along)]


def _difference(
    derivatives: Derivatives, whole: SizedBatch, pieces: Sequence[SizedBatch]
) -> tuple[float, float] | None:
    """The loss of samples, and what those of pieces of them make of it, where these differ by more than rounding."""
    counted = [(piece, weight) for piece in pieces if (weight := derivatives.weight(*piece))]
    if not counted:
        return None
    weights = [weight for _, weight in counted]
    with untouched(derivatives.model, mode=derivatives.mode):
        (value, *numbers), tolerance = _numbers(derivatives, [whole, *(piece for piece, _ in counted)])
        mean = sum(number * weight for number, weight in zip(numbers, weights, strict=True)) / sum(weights)
        close = abs(value - mean) <= tolerance * max(_CANCELLED, *map(abs, (value, *numbers)))
        if close or not abs(value) < float("inf"):  # which is said where the sums are taken
            return None
        return None if draws(derivatives, *whole) else (value, mean)


def draws(derivatives: Derivatives, batch: Batch, size: int) -> bool:
    """Whether the loss is another each time, as one that samples is: then parts of a batch tell nothing."""
    with same_randomness(derivatives.model):
        first, second = (_number(derivatives, (batch, size), derivatives.cast()) for _ in range(2))
    return first != second


def _numbers(derivatives: Derivatives, batches: Sequence[SizedBatch]) -> tuple[list[float], float]:
    """The losses, and the relative difference that rounding makes; without autocast where the code runs so."""
    narrow = min(parameter.element_size() for parameter in derivatives.parameters) < 4
    if derivatives.resources.autocast is not None:
        with suppress(RuntimeError):
            return [_number(derivatives, one, nullcontext()) for one in batches], 2e-2 if narrow else 1e-4
        narrow = True
    return [_number(derivatives, one, derivatives.cast()) for one in batches], 2e-2 if narrow else 1e-4


def _number(derivatives: Derivatives, sized: SizedBatch, cast: AbstractContextManager[object]) -> float:
    batch, size = sized
    with cast:
        return derivatives.weights.mean(derivatives.objective.number_alone(derivatives.model, batch), size).item()

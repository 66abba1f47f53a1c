"""Losses that should be equal: of each batch on two sweeps, and of a batch and its samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_flowprune.gradients.batches.batch_derivatives import Derivatives
from torch_flowprune.gradients.batches.loss_of_parts import draws
from torch_flowprune.inputs import Batch, Ranks, first

_LEAST = 1e-6
"""Relative, of what is told apart: some roundings in float32."""


def check_same_count(first: int, second: int) -> None:
    """An error where the data were not as many samples twice."""
    if second != first:
        raise ValueError(
            f"the data gave {first} samples on the first sweep, {second} on the second: g and H need the same data"
        )


def check_same_losses(first: Sequence[Tensor], second: Sequence[Tensor], dtype: torch.dtype, ranks: Ranks) -> None:
    """An error on every rank, where a batch of one of them was another."""
    if difference := _difference_on_any_rank(first, second, dtype, ranks):
        index, before, after = difference
        found = f"of batch {index} was {before:.6g} on the first sweep, {after:.6g} on the second"
        raise ValueError(
            f"the loss {found if index >= 0 else 'on another rank changed between the sweeps'}: g and H need the "
            "same data, and this data has a random source that is not restored (the data set's own generator, "
            "persistent workers); pass the batches in a list, or a loader that gives the same ones each time"
        )


class SampleLosses:
    """Of each batch, what the losses of its samples make: its own loss, unless samples draw dropout or noise of theirs.

    In train mode they do, and where the loss is another each time it is run.
    """

    def __init__(self, derivatives: Derivatives) -> None:
        self.derivatives, self.means, self.sample = derivatives, list[Tensor](), None

    def add(self, mean: Tensor, batch: Batch, size: int) -> None:
        """The mean over a batch's samples."""
        if self.derivatives.mode == "train":
            return
        if not self.means:
            self.sample = first(batch, size, 1, self.derivatives.weights.along)
        self.means.append(mean)

    def check(self, whole: Sequence[Tensor], ranks: Ranks) -> None:
        """An error on every rank, where the loss of a batch of one of them is no mean of those of its samples."""
        if not self.means:
            return
        if difference := _difference_on_any_rank(whole, self.means, self.derivatives.digits(), ranks):
            if draws(self.derivatives, self.sample, 1):
                return
            index, value, mean = difference
            found = f"of batch {index} is {value:.6g}, and the mean of its samples' losses {mean:.6g}"
            raise ValueError(
                f"the loss {found if index >= 0 else 'of a batch on another rank is no mean over its samples'}: "
                "squares of sample gradients need samples that do not depend on each other, and a loss that is their "
                "mean or sum; say where samples lie with batch_dim= (None for what they share), or how the loss "
                "reduces a batch with reduction="
            )


def _difference_on_any_rank(
    first: Sequence[Tensor], second: Sequence[Tensor], dtype: torch.dtype, ranks: Ranks
) -> tuple[int, float, float] | None:
    """That of this rank, -1 for its place where only another has one; None where none has, on all of them alike."""
    difference = _first_difference(first, second, dtype)
    anywhere = torch.tensor([float(difference[0] >= 0)], device=first[0].device)
    ranks.sum([anywhere])
    return difference if anywhere.item() else None


def _first_difference(
    first: Sequence[Tensor], second: Sequence[Tensor], dtype: torch.dtype
) -> tuple[int, float, float]:
    """The first batch whose losses differ by more than rounding in this dtype, and both; -1 where none does.

    The sweeps compute by operators that are equal, and round in ways of their own: half the digits are held against
    each other, of the loss or, where it is nearly 0, of the mean loss. Models in float64 may have code inside that
    computes in float32.
    """
    count = min(len(first), len(second))
    if not count:
        return -1, 0.0, 0.0
    before, after = torch.stack([*first[:count]]).double(), torch.stack([*second[:count]]).double()
    size = before.abs().clamp(min=before.abs().mean().item())
    tolerance = max(_LEAST, *(torch.finfo(one).eps ** 0.5 for one in (dtype, first[0].dtype)))
    differs = ~((after - before).abs() <= size * tolerance)
    if not differs.any():
        return -1, 0.0, 0.0
    index = int(differs.int().argmax())
    return index, before[index].item(), after[index].item()

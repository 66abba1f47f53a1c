"""A loss that fails in the mode that the model is in, and what makes it run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

from torch import nn

from torch_flowprune.inputs import Batch, Loss, Objective, call, in_two, untouched

_OF_OUTPUTS = (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError)
"""What code raises that meets another kind of output than it was written for."""


@contextmanager
def other_mode_told(
    model: nn.Module, objective: Objective, batch: Batch, mode: str, *, alone: bool = True
) -> Iterator[None]:
    """Around the loss of a batch: detectors, for instance, return losses in train mode, and boxes in eval mode.

    Nothing is said but what was tried: the same loss in train mode, or the model in train mode with the targets.
    Nothing is tried where other ranks have to run the model too (not ``alone``).

    Raises:
        ValueError: in the place of an error that the other way does not have.
    """
    try:
        yield
    except _OF_OUTPUTS as error:
        if not alone:
            raise
        found = f"({type(error).__name__}: {error})"
        if mode == "eval" and _runs(model, lambda: objective(model, batch)):
            raise ValueError(
                f"the loss fails on what the model returns in eval mode, and runs in train mode {found}: pass "
                'mode="train"'
            ) from error
        if objective.loss is not None and _runs(model, partial(_of_targets, model, objective.loss, batch)):
            raise ValueError(
                f"the loss fails {found}; it runs on what the model returns in train mode from inputs and targets, and "
                'loss= gives it inputs alone: pass mode="train" and closure= in its place, such as closure=lambda '
                "model, batch: sum(model(*batch).values())"
            ) from error
        raise


def _of_targets(model: nn.Module, loss: Loss, batch: Batch) -> object:
    inputs, targets = in_two(batch)
    return loss(call(model, (inputs, targets)), targets)


def _runs(model: nn.Module, work: Callable[[], object]) -> bool:
    with suppress(Exception), untouched(model, mode="train"):
        work()
        return True
    return False

"""Reentrant checkpointing, which hides a block from gradients by name: told in words that name it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_HIDDEN = "None of the inputs have requires_grad=True"


@contextmanager
def no_reentrant_checkpoints() -> Iterator[None]:
    """Around a backward: torch's error speaks of calls that the user has not made."""
    try:
        yield
    except RuntimeError as error:
        if "use_reentrant=True" not in str(error):
            raise
        raise _reentrant() from error


@contextmanager
def no_hidden_blocks() -> Iterator[None]:
    """Around forwards: torch warns of a block whose inputs need no gradient, and its weights then get none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=_HIDDEN)
        try:
            yield
        except UserWarning as warning:
            if _HIDDEN not in str(warning):
                raise
            raise _reentrant() from warning


def _reentrant() -> RuntimeError:
    return RuntimeError(
        "the model checkpoints activations with use_reentrant=True, through which no gradients by name can be "
        "taken: use use_reentrant=False, or switch checkpointing off while scoring"
    )

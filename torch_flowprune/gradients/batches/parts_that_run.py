"""What a model says on a part of a batch that was cut where it should not be."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_OF_SIZES = re.compile(r"\b(sizes?|shapes?|dimensions?|index|indices|out of (bounds|range))\b", re.IGNORECASE)


@contextmanager
def parts_that_run() -> Iterator[None]:
    """Around runs on parts of a batch: an error of sizes says that the batch was cut, and how to say where.

    Raises:
        ValueError: in its place.
    """
    try:
        yield
    except (IndexError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or not _OF_SIZES.search(str(error)):
            raise
        raise ValueError(
            "max_memory=, halves and squares of sample gradients cut a batch, and on a part of it the model or the "
            "loss fails: pass None in batch_dim= for what all samples share; if samples depend on each other, like the "
            f"nodes of a graph, use a measure that runs whole batches, without max_memory= ({error})"
        ) from error

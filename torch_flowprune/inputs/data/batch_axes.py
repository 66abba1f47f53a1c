"""Where samples lie in a batch: along which axis of which tensor, as ``batch_dim=`` says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from torch_flowprune.inputs.data.containers import Batch, held, refilled
from torch_flowprune.inputs.data.ragged import is_ragged, number_in

BatchDim: TypeAlias = Any
"""An axis, None for what all samples share, or these nested as the batch is: as the ``in_dims`` of ``torch.vmap``."""


def check_batch_dim(batch_dim: object) -> None:
    """An error for what is neither an axis, None, nor a nesting of these."""
    parts = batch_dim.values() if isinstance(batch_dim, Mapping) else batch_dim
    if isinstance(parts, Iterable) and not isinstance(parts, (str, Tensor)):
        for part in parts:
            check_batch_dim(part)
    elif batch_dim is not None and (isinstance(batch_dim, bool) or not isinstance(batch_dim, int) or batch_dim < 0):
        raise ValueError(
            "batch_dim should be the axis that samples lie along (0 or more), None for what all of them share, or "
            f"these nested as the batch is, such as (1, 0) for inputs and target, got {batch_dim!r}"
        )


@dataclass(frozen=True)
class Along:
    """A part of a batch, and where samples lie in it."""

    value: Any
    along: BatchDim


def axes_of(part: Along) -> Iterator[tuple[Any, int]]:
    """The leaves that samples lie in, each with the axis: the first, where it has not as many as were told."""
    if is_ragged(part.value):
        if part.along is not None:
            yield part.value, 0
    elif isinstance(part.value, Tensor):
        if part.value.dim() and isinstance(part.along, int):
            yield part.value, part.along if part.along < part.value.dim() else 0
    else:
        for inner in below(part):
            yield from axes_of(inner)


def length(leaf: Any, axis: int) -> int:
    """How many samples may lie along an axis."""
    return number_in(leaf) if is_ragged(leaf) else int(leaf.shape[axis])


def below(part: Along) -> Iterator[Along]:
    """What a container holds, and where samples lie in each; nothing of what is none.

    Raises:
        ValueError: where the two are nested in different ways.
    """
    along, parts = part.along, held(part.value) or {}
    listed = isinstance(part.value, (tuple, list))
    nested = isinstance(along, (tuple, list))
    if (listed and isinstance(along, Mapping)) or (nested and not (listed and len(along) == len(parts)) and parts):
        raise ValueError(
            f"batch_dim={along!r} should be nested as the batch is, which has a {type(part.value).__name__} of "
            f"{len(parts)} parts there"
        )
    for key, inner in parts.items():
        yield Along(inner, along.get(key, 0) if isinstance(along, Mapping) else along[key] if nested else along)


def mapped_along(function: Callable[[Any, BatchDim], Any], part: Along, is_leaf: Callable[[object], bool]) -> Batch:
    """A batch of the same form with ``function`` of each leaf and of where samples lie in it."""
    if is_leaf(part.value):
        return function(part.value, part.along)
    if (parts := held(part.value)) is None:
        return part.value
    inner = [mapped_along(function, one, is_leaf) for one in below(part)]
    return refilled(part.value, dict(zip(parts, inner, strict=True)))

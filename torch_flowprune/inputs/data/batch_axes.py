"""Where samples lie in a batch: along which axis of which tensor, as ``batch_dim=`` says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from torch_flowprune.inputs.data.batches import Batch, like

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


def axes_of(part: Along) -> Iterator[tuple[Tensor, int]]:
    """The tensors that samples lie in, each with the axis: the first, where it has not as many as were told."""
    if isinstance(part.value, Tensor):
        if part.value.dim() and isinstance(part.along, int):
            yield part.value, part.along if part.along < part.value.dim() else 0
    elif isinstance(part.value, (Mapping, tuple, list)):
        for inner in below(part):
            yield from axes_of(inner)


def below(part: Along) -> Iterator[Along]:
    """What a container holds, and where samples lie in each.

    Raises:
        ValueError: where the two are nested in different ways.
    """
    value, along = part.value, part.along
    if isinstance(value, Mapping):
        of_keys = isinstance(along, Mapping)
        yield from (Along(inner, along.get(key, 0) if of_keys else along) for key, inner in value.items())
        return
    nested = isinstance(along, (tuple, list))
    if isinstance(along, Mapping) or (nested and len(along) != len(value)):
        raise ValueError(
            f"batch_dim={along!r} should be nested as the batch is, which has a {type(value).__name__} of {len(value)} "
            "parts there"
        )
    yield from (Along(inner, along[i] if nested else along) for i, inner in enumerate(value))


def mapped_along(function: Callable[[Any, BatchDim], Any], part: Along, is_leaf: Callable[[object], bool]) -> Batch:
    """A batch of the same form with ``function`` of each leaf and of where samples lie in it."""
    value = part.value
    if is_leaf(value):
        return function(value, part.along)
    if not isinstance(value, (Mapping, tuple, list)):
        return value
    inner = [mapped_along(function, one, is_leaf) for one in below(part)]
    if isinstance(value, Mapping):
        return like(value, dict(zip(value, inner, strict=True)))
    return type(value)(*inner) if hasattr(value, "_fields") else type(value)(inner)

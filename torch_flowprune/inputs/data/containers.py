"""What holds the tensors of a batch (mappings, tuples, lists, dataclasses), and the same with others in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from copy import copy
from dataclasses import fields, is_dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

Batch: TypeAlias = Any


def held(value: Any) -> dict[Any, Any] | None:
    """What a container holds, by key, field or place; None for anything else."""
    if isinstance(value, PackedSequence):  # a named tuple that is one thing
        return None
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (tuple, list)):
        return dict(enumerate(value))
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return None


def refilled(container: Any, parts: Mapping[Any, Any]) -> Any:
    """A container of the same kind that holds these."""
    if isinstance(container, Mapping):
        return _like(container, dict(parts))
    if isinstance(container, (tuple, list)):
        kind = type(container)
        return kind(*parts.values()) if hasattr(container, "_fields") else kind(parts.values())
    same = copy(container)
    for name, part in parts.items():
        object.__setattr__(same, name, part)  # a frozen one too
    return same


def _like(batch: Mapping[str, Any], values: dict[str, Any]) -> Mapping[str, Any]:
    """A mapping of the batch's own kind, a tokenizer's say, where that can be made."""
    if type(batch) is dict or not isinstance(batch, MutableMapping):
        return values
    same = copy(batch)
    same.update(values)
    return same


def is_leaf(value: object) -> bool:
    """Whether it is a tensor, or sequences of several lengths that are packed in some."""
    return isinstance(value, (Tensor, PackedSequence))


def mapped(function: Callable[[Any], Any], batch: Batch, is_leaf: Callable[[object], bool] = is_leaf) -> Batch:
    """A batch of the same form with ``function`` of each leaf: of each tensor, unless told otherwise."""
    if is_leaf(batch):
        return function(batch)
    if (parts := held(batch)) is None:
        return batch
    return refilled(batch, {key: mapped(function, part, is_leaf) for key, part in parts.items()})


def leaves_in(batch: Batch) -> Iterator[Any]:
    """Every tensor and packed sequence of a batch, in order."""
    if is_leaf(batch):
        yield batch
    for part in (held(batch) or {}).values():
        yield from leaves_in(part)


def tensors_in(batch: Batch) -> Iterator[Tensor]:
    """Every tensor of a batch that has a shape, in order: nested ones have none."""
    return (leaf for leaf in leaves_in(batch) if isinstance(leaf, Tensor) and not leaf.is_nested)


def on_device(batch: Batch, device: torch.device) -> Batch:
    """A batch whose tensors are on the device, and so are those of objects that can be moved there (graphs, say)."""
    return mapped(lambda leaf: _there(leaf, device), batch, lambda value: is_leaf(value) or _moves_itself(value))


def _moves_itself(value: object) -> bool:
    return held(value) is None and not isinstance(value, type) and callable(getattr(value, "to", None))


def _there(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value.to(device)

"""Values that hold tensors, compared by what they hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass

import torch
from torch import Tensor

from torch_flowprune.inputs.shards import lie_alike, local


def same_values(one: object, other: object) -> bool:
    """Whether two values are of one type and hold the same: tensors of one shape, dtype and device, equal everywhere.

    Of shards the parts that are here.

    >>> same_values({"a": torch.ones(2)}, {"a": torch.ones(2)}), same_values([torch.ones(2)], [torch.ones(3)])
    (True, False)
    """
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        alike = one.device == other.device and one.dtype is other.dtype and lie_alike(one, other)
        return alike and torch.equal(local(one), local(other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return list(one) == list(other) and all(same_values(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(same_values, one, other))
    if is_dataclass(one) and not isinstance(one, type):
        return all(same_values(getattr(one, field.name), getattr(other, field.name)) for field in fields(one))
    return one == other


class ComparedByValue:
    """What equals another of its type that holds the same, and has no hash, as a list has none."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return self is other or same_values(self, other)

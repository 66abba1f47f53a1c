"""Samples in one object that knows how many they are: nested tensors, packed sequences, tensordict's objects."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence


def is_ragged(value: object) -> bool:
    """Whether it is one of them, which are cut as a whole."""
    if isinstance(value, Tensor):
        return value.is_nested
    return isinstance(value, PackedSequence) or _has_batch_size(value)


def _has_batch_size(value: Any) -> bool:
    """As the dictionaries and classes of tensordict have it, whose tensors keep to it."""
    size = value.batch_size if hasattr(type(value), "batch_size") else None
    return isinstance(size, torch.Size) and len(size) > 0


def number_in(value: Any) -> int:
    """How many samples.

    >>> number_in(pack_sequence([torch.zeros(3), torch.zeros(2)]))
    2
    """
    if isinstance(value, PackedSequence):
        return int(value.batch_sizes[0])
    return int(value.batch_size[0] if _has_batch_size(value) else value.size(0))


def some_of(value: Any, piece: slice) -> Any:
    """The same kind of object with some of the samples."""
    if isinstance(value, PackedSequence):
        return pack_sequence(unpack_sequence(value)[piece], enforce_sorted=value.sorted_indices is None)
    if _has_batch_size(value):
        return value[piece]
    return torch.nested.as_nested_tensor(list(value.unbind())[piece], layout=value.layout)

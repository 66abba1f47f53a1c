"""Samples of unequal length in one object: torch's nested tensors and packed sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence


def is_ragged(value: object) -> bool:
    """Whether it is one of them, which have no axis to be sliced along."""
    return isinstance(value, PackedSequence) or (isinstance(value, Tensor) and value.is_nested)


def number_in(value: Any) -> int:
    """How many samples.

    >>> number_in(pack_sequence([torch.zeros(3), torch.zeros(2)]))
    2
    """
    return int(value.batch_sizes[0]) if isinstance(value, PackedSequence) else int(value.size(0))


def some_of(value: Any, piece: slice) -> Any:
    """The same kind of object with some of the samples."""
    if isinstance(value, PackedSequence):
        return pack_sequence(unpack_sequence(value)[piece], enforce_sorted=value.sorted_indices is None)
    return torch.nested.as_nested_tensor(list(value.unbind())[piece], layout=value.layout)

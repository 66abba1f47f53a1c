"""Tensors compared as they lie in memory: nan equals itself, and any dtype can be compared."""

from __future__ import annotations

import torch
from torch import Tensor


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bits."""
    return one.shape == other.shape and one.dtype is other.dtype and torch.equal(_bits(one), _bits(other))


def _bits(value: Tensor) -> Tensor:
    return value.detach().contiguous().reshape(-1).view(torch.uint8)

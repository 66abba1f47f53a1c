"""Which memory a tensor is of, and which part."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def memory_of(tensor: Tensor) -> int:
    """The same number for tensors that share memory."""
    return tensor.untyped_storage().data_ptr() or id(tensor)


def layout_of(tensor: Tensor) -> Any:
    """What tells which part of which memory a tensor is."""
    return memory_of(tensor), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.storage_offset()


def without_content(tensor: Tensor) -> Tensor:
    """A tensor without content, so that the graph holds no memory; laid out as this one where that has no gaps."""
    return torch.empty_like(tensor, device="meta")

"""Masks at rest: eight entries to a byte."""

from __future__ import annotations

import torch
from torch import Tensor

_BIT_VALUES = tuple(1 << i for i in range(8))


def pack(mask: Tensor) -> Tensor:
    """A mask's entries in order, eight to a byte, lowest bit first.

    >>> pack(torch.tensor([True, False, True]))
    tensor([5], dtype=torch.uint8)
    """
    flat = (mask != 0).reshape(-1).to(torch.uint8)
    bits = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    return (bits * torch.tensor(_BIT_VALUES, dtype=torch.uint8, device=mask.device)).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, shape: torch.Size) -> Tensor:
    """The mask of ``shape`` that :func:`pack` made these bytes of.

    Raises:
        ValueError: if they are not the bytes of such a mask.

    >>> unpack(torch.tensor([5], dtype=torch.uint8), torch.Size([3]))
    tensor([ True, False,  True])
    """
    count = -(-shape.numel() // 8)
    if packed.dtype is not torch.uint8 or packed.shape != (count,):
        raise ValueError(
            f"a packed mask of shape {tuple(shape)} is {count} bytes (uint8), got {packed.dtype} of shape "
            f"{tuple(packed.shape)}"
        )
    bits = packed[:, None] & torch.tensor(_BIT_VALUES, dtype=torch.uint8, device=packed.device)
    return (bits != 0).view(-1)[: shape.numel()].view(shape)

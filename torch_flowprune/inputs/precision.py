"""Models run in more digits than their own for a while: float16 in float32, or anything in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn


def is_half(model: nn.Module) -> bool:
    """Whether a parameter of the model is of float16; bfloat16 has the range of float32."""
    return any(parameter.dtype is torch.float16 for parameter in model.parameters())


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Inside, parameters and buffers of float16 are of float32: derivatives underflow in it.

    Raises:
        RuntimeError: where the model's code is fixed to float16.
    """
    try:
        with widened(model, torch.float32, torch.float16):
            yield
    except RuntimeError as error:
        if not is_half(model) or "dtype" not in str(error):
            raise
        raise RuntimeError(
            "derivatives of a float16 model underflow, and are taken in float32; something in this one is fixed to "
            f"another dtype: score model.float() or model.bfloat16() (torch says: {error})"
        ) from error


@contextmanager
def widened(model: nn.Module, dtype: torch.dtype, *narrow: torch.dtype) -> Iterator[None]:
    """Inside, parameters and buffers of the narrow dtypes are of this one; afterwards they have their own memory."""
    tensors: chain[Tensor] = chain(model.parameters(), model.buffers())
    kept = [(tensor, tensor.data) for tensor in tensors if tensor.dtype in narrow]
    try:
        for tensor, value in kept:
            tensor.data = value.to(dtype)
        yield
    finally:
        for tensor, value in kept:
            tensor.data = value

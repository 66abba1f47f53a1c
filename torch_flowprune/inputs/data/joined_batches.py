"""The samples of two batches in one."""

from __future__ import annotations

from types import NoneType
from typing import Any

import torch
from torch import Tensor

from torch_flowprune.inputs.data.batch_axes import Along, BatchDim, axes_of, below
from torch_flowprune.inputs.data.containers import Batch, held, refilled
from torch_flowprune.inputs.data.ragged import is_ragged


class ApartError(ValueError):
    """Two batches do not go together."""


def as_one(one: Batch, other: Batch, sizes: tuple[int, int], along: BatchDim = 0) -> Batch:
    """A batch of the form of ``one`` with the samples of both, of which there are ``sizes``.

    Raises:
        ApartError: where they do not go together: they differ in what samples share, or in the lengths of sequences.

    >>> as_one((torch.zeros(2, 3), [0, 0]), (torch.ones(1, 3), [1]), (2, 1))[1]
    [0, 0, 1]
    """
    return _as_one(Along(one, along), Along(other, along), sizes)


def _as_one(one: Along, other: Along, sizes: tuple[int, int]) -> Any:
    a, b = one.value, other.value
    if isinstance(a, Tensor) and isinstance(b, Tensor) and not (is_ragged(a) or is_ragged(b)):
        return _of_tensors(one, b, sizes)
    if _are_samples(a, b, sizes):
        return [*a, *b]
    parts, others = (None, None) if is_ragged(a) else (held(a), held(b))
    if parts is not None and others is not None and list(parts) == list(others):
        inner = zip(below(one), below(other), strict=True)
        return refilled(a, {key: _as_one(*pair, sizes) for key, pair in zip(parts, inner, strict=True)})
    if isinstance(a, (int, float, str, NoneType)) and type(a) is type(b) and a == b:
        return a
    raise ApartError


def _are_samples(a: Any, b: Any, sizes: tuple[int, int]) -> bool:
    """Whether lists have an entry a sample, and are none of tensors that hold all of them."""
    listed = isinstance(a, list) and isinstance(b, list) and (len(a), len(b)) == sizes
    return listed and not all(isinstance(one, Tensor) and one.dim() and len(one) == sizes[0] for one in a)


def _of_tensors(one: Along, b: Tensor, sizes: tuple[int, int]) -> Tensor:
    a: Tensor = one.value
    axis = next((axis for _, axis in axes_of(one)), None)
    lengths = None if axis is None or b.dim() != a.dim() else (a.shape[axis], b.shape[axis])
    if axis is None or lengths != sizes:
        if torch.equal(a, b):
            return a
    elif a.transpose(0, axis)[0].shape == b.transpose(0, axis)[0].shape:
        return torch.cat([a, b], axis)
    raise ApartError

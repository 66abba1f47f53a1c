"""Which parameters may take the place of one that is masked."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from torch_flowprune.inputs import masked

_Value = TypeVar("_Value", bound=Tensor)


def fit_for_mask(parameter: _Value | None, mask: Tensor, what: str) -> _Value:
    """The parameter, where the mask fits it: what does not fit would be spread over the mask's shape, or fail later.

    ``what`` is masked, says an error.

    Raises:
        ValueError: for one of another shape, a quantised or a sparse one, and any other that cannot be masked.
    """
    if parameter is None or parameter.shape != mask.shape:
        found = None if parameter is None else f"shape {tuple(parameter.shape)}"
        raise ValueError(
            f"{what} is pruned, so what replaces it should have its mask's shape {tuple(mask.shape)}, got {found}: "
            "fp.remove first"
        )
    if parameter.is_meta:
        raise ValueError(
            f"{what} is pruned, and a tensor on the meta device has no values for its mask: assign one that has, or "
            "load a state dict with assign=True"
        )
    if parameter.is_quantized or parameter.layout is not torch.strided or not _can_be_masked(parameter, mask):
        raise ValueError(
            f"{what} is pruned, and a {_kind(parameter)} cannot carry its mask: fp.remove first, which leaves zeros "
            "in the weight"
        )
    return parameter


def _can_be_masked(parameter: Tensor, mask: Tensor) -> bool:
    """By trying: subclasses of tensors are many."""
    try:
        return masked(parameter.detach(), mask.to(parameter.device)).shape == mask.shape
    except (RuntimeError, NotImplementedError, TypeError):
        return False


def _kind(parameter: Tensor) -> str:
    if parameter.is_quantized:
        return "quantised tensor"
    return f"{type(parameter.data).__name__} of layout {parameter.layout}"

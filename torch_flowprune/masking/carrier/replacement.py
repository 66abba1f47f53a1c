"""Which parameters may take the place of one that is masked."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torch_flowprune.inputs import masked


def fit_for_mask(parameter: nn.Parameter | None, mask: Tensor, name: str) -> nn.Parameter:
    """The parameter, where the mask fits it: what does not fit would be spread over the mask's shape, or fail later.

    Raises:
        ValueError: for one of another shape, a quantised or a sparse one, and any other that cannot be masked.
    """
    if parameter is None or parameter.shape != mask.shape:
        found = None if parameter is None else f"shape {tuple(parameter.shape)}"
        raise ValueError(
            f"{name!r} is pruned, so what replaces it should have its mask's shape {tuple(mask.shape)}, got {found}: "
            "fp.remove first"
        )
    if parameter.is_quantized or parameter.layout is not torch.strided or not _can_be_masked(parameter, mask):
        raise ValueError(
            f"{name!r} is pruned, and a {_kind(parameter)} cannot carry its mask: fp.remove first, which leaves zeros "
            "in the weight"
        )
    return parameter


def _can_be_masked(parameter: nn.Parameter, mask: Tensor) -> bool:
    """By trying: subclasses of tensors are many."""
    try:
        return masked(parameter.detach(), mask.to(parameter.device)).shape == mask.shape
    except (RuntimeError, NotImplementedError, TypeError):
        return False


def _kind(parameter: nn.Parameter) -> str:
    if parameter.is_quantized:
        return "quantised tensor"
    return f"{type(parameter.data).__name__} of layout {parameter.layout}"

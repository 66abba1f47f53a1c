"""Convolutions that rewrite their weight before they use it (weight standardisation).

The mask on the kernel really used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from torch_flowprune.inputs import masked

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_OPERATORS = (functional.conv1d, functional.conv2d, functional.conv3d)


def has_own_forward(kind: type[nn.Module]) -> bool:
    """Whether a class is a convolution with a forward of its own, which may rewrite the weight on its way."""
    return any(issubclass(kind, base) and kind.forward is not base.forward for base in _CONVOLUTIONS)


class MaskedKernel(TorchFunctionMode):
    """Inside, a convolution's kernel of the mask's shape is masked on its way in.

    What it already has at zero stays so.
    """

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _OPERATORS and len(args) > 1 and args[1].shape == self.mask.shape:
            args = (args[0], masked(args[1], self.mask), *args[2:])
        return func(*args, **(kwargs or {}))


def zeros_survive(module: nn.Module, forward: Any, mask: Tensor) -> bool:
    """Whether the kernel that ``forward`` uses is zero wherever the mask is."""
    kernel = _kernel_used(module, forward)
    return kernel is None or not bool(kernel[~mask].any())


class _Kernel(Exception):  # noqa: N818 - it carries the kernel out of a forward that is not to be finished
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value


class _Capture(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _OPERATORS:
            raise _Kernel(args[1])
        return func(*args, **(kwargs or {}))


def _kernel_used(module: Any, forward: Any) -> Tensor | None:
    """The kernel that reaches the convolution, without running it; None where it cannot be seen."""
    inputs = module.weight.new_zeros(1, module.in_channels, *module.kernel_size)
    try:
        with torch.no_grad(), _Capture():
            forward(module, inputs)
    except _Kernel as kernel:
        return kernel.value
    return None

"""Convolutions known to standardise their weight before they use it: their mask is on the kernel, after that.

What any other class makes of its weight is its own affair: it reads a weight with zeros, and ``kernels_used`` sees
whether they last.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from torch_flowprune.inputs import masked

CONVOLUTIONS = (functional.conv1d, functional.conv2d, functional.conv3d)

# By name, so that nothing is imported. Each forward runs one convolution, by the kernel that it has standardised.
_LIBRARIES = ("timm", "transformers", "torchvision")
_CLASSES = ("StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame", "WeightStandardizedConv2d")
_FORWARDS = {f"{name}.forward" for name in _CLASSES}


def standardises(kind: type[nn.Module]) -> bool:
    """Whether the forward of a class is one of those known; that of a subclass's own is not."""
    module = getattr(kind.forward, "__module__", None) or ""  # None where torch.fx has made the code
    library = module.partition(".")[0]
    return library in _LIBRARIES and getattr(kind.forward, "__qualname__", "") in _FORWARDS


def only_whole_filters(mask: Tensor) -> bool:
    """Whether zeros in the weight are zeros in the standardised kernel: where all of a filter is zero, or nothing."""
    rows = mask.flatten(1)
    return torch.equal(rows.any(1), rows.all(1))


class MaskedKernel(TorchFunctionMode):
    """Inside, the kernel that a convolution computes by is masked on its way in.

    Another module's own parameter, or a kernel of another shape, is not that kernel. A tracer's stand-in has neither.
    """

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in CONVOLUTIONS and len(args) > 1 and self._is_computed(args[1]):
            args = (args[0], masked(args[1], self.mask), *args[2:])
        return func(*args, **(kwargs or {}))

    def _is_computed(self, kernel: Any) -> bool:
        if not isinstance(kernel, Tensor):
            return True
        return not isinstance(kernel, nn.Parameter) and kernel.shape == self.mask.shape

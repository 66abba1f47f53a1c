"""What a layer's weight is multiplied with: E[x xᵀ] over the data, and whether the layer computes just that product."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, unfold

from torch_flowprune.inputs import Objective, Target, as_batches, first_axis, sized, wide

_MORE = "its forward is not the product of its inputs and this weight"


def unfit(target: Target) -> str | None:
    """Why a weight is not one of linear layers and ungrouped 2-d convolutions, if it is not."""
    for module, attribute in target.owners:
        if attribute != "weight" or not (_is_linear(module) or isinstance(module, nn.Conv2d)):
            return f"a {type(module).__name__}'s {attribute} is not multiplied with the layer's inputs alone"
        if isinstance(module, nn.Conv2d) and (module.groups > 1 or module.padding_mode != "zeros"):
            return "a convolution in groups, or padded with other values than 0"
    return None


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def columns(target: Target, tensor: Tensor) -> Tensor:
    """A weight, or its mask, with a row for each output."""
    return tensor.detach().T if target.output_axis == 1 else tensor.detach().flatten(1)


def input_products(
    model: nn.Module,
    target: Target,
    places: Mapping[nn.Module, int | None],
    data: object,
    max_samples: int | None,
) -> Tensor | str:
    """E[x xᵀ] of what the weight is multiplied with, and of a 1 for each bias; or why it cannot be told.

    ``places``: for each layer that has the weight, which of the biases it adds.
    """
    seen = _InputsOfLayers(target, places)
    hooks = [module.register_forward_hook(seen.note, prepend=True, with_kwargs=True) for module in places]
    try:
        read = 0
        for batch, size in sized(as_batches(data), target.parameter.device, max_samples, first_axis):
            read += size
            Objective().forward(model, batch)
            if seen.reason:
                return seen.reason
    finally:
        for hook in hooks:
            hook.remove()
    if not read:
        raise ValueError("the data is empty: at least one batch is needed (an exhausted iterator? pass a DataLoader)")
    return "the data do not reach it" if seen.total is None else seen.total / seen.count


class _InputsOfLayers:
    """The sum of x xᵀ, and over how many x, of the layers that have one weight."""

    def __init__(self, target: Target, places: Mapping[nn.Module, int | None]) -> None:
        self.target, self.places, self.reason = target, places, ""
        self.biases = len({place for place in places.values() if place is not None})
        self.total: Tensor | None = None
        self.count = 0
        self._known: set[nn.Module] = set()

    def note(self, module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        rows = _rows(module, args[0] if args else next(iter(keywords.values())))
        if module not in self._known and not self._is_product(module, rows, output):
            self.reason = _MORE
        self._known.add(module)
        if self.reason:
            return
        place = self.places[module]
        rows = pad(rows, (0, self.biases))
        if place is not None:
            rows[:, rows.shape[1] - self.biases + place] = 1
        product = rows.T @ rows
        self.total = product if self.total is None else self.total.add_(product)
        self.count += len(rows)

    def _is_product(self, module: nn.Module, rows: Tensor, output: Any) -> bool:
        """A subclass may do more, and a kernel may be computed from the weight."""
        weight = wide(columns(self.target, self.target.theta))
        if not isinstance(output, Tensor) or rows.shape[1] != weight.shape[1]:
            return False
        found = output.flatten(-2).transpose(-2, -1) if isinstance(module, nn.Conv2d) else output
        expected = rows @ weight.T
        if isinstance(bias := getattr(module, "bias", None), Tensor):
            expected = expected + wide(bias.detach())
        if found.numel() != expected.numel():
            return False
        tolerance = max(1e-2, torch.finfo(output.dtype).eps ** 0.5)
        return bool((found.reshape(expected.shape) - expected).norm() <= tolerance * expected.norm())


def _rows(module: nn.Module, inputs: Tensor) -> Tensor:
    """What one row of the weight is multiplied with, one a row."""
    inputs = wide(inputs.detach())
    if isinstance(module, nn.Conv2d):
        padded = pad(inputs, [side for both in reversed(_padding(module)) for side in both])
        patches = unfold(padded, module.kernel_size, module.dilation, 0, module.stride)
        return patches.transpose(-2, -1).flatten(0, -2)
    return inputs.flatten(0, -2)


def _padding(module: nn.Conv2d) -> list[tuple[int, int]]:
    """How many zeros a convolution puts before and behind each axis of an image."""
    if module.padding == "same":
        more = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return [(zeros // 2, zeros - zeros // 2) for zeros in more]
    return [(0, 0)] * 2 if module.padding == "valid" else [(zeros, zeros) for zeros in module.padding]  # type: ignore[misc]

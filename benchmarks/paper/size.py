"""What is left of a masked network.

The parameters and multiply-adds that the network without its dead channels would have.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Size:
    """Counts of the network that is left.

    Attributes:
        parameters: weights between living channels, batch norm of living channels, biases.
        macs: multiply-adds of its convolutions and linear layers for one image.
    """

    parameters: int
    macs: int


def size(model: nn.Module, shape: tuple[int, ...] = (3, 32, 32)) -> Size:
    """Count what is alive.

    Of a layer, its filters that are not all zero, over the input channels that anything can come through. A channel is
    alive where a copy of the model with every weight that is not zero made positive answers a positive input with
    anything but zero. So an addition keeps a channel as long as one side has it, and the zeroed filters in front of it
    are not counted (the paper's code counted them).
    """
    probe = _positive(copy.deepcopy(model))
    found: list[Size] = []
    hooks = [module.register_forward_hook(lambda *call: found.append(_count(*call))) for module in probe.modules()]
    with torch.no_grad():
        probe(torch.ones(1, *shape, dtype=torch.float64))
    for hook in hooks:
        hook.remove()
    return Size(sum(one.parameters for one in found), sum(one.macs for one in found))


def _positive(model: nn.Module) -> nn.Module:
    """Every weight that is not zero made positive, and batch norm without statistics.

    Small enough that nothing overflows.
    """
    model = model.cpu().double().eval()
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                alive = getattr(module, name.removesuffix("_orig")) != 0
                parameter.copy_(alive.double() / (parameter[0].numel() if parameter.dim() > 1 else 1))
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
    return model


def _count(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> Size:
    if isinstance(module, nn.BatchNorm2d):
        alive = (module.weight != 0) | (module.bias != 0)
        return Size(2 * int(alive.sum()), 0)
    if not isinstance(module, (nn.Conv2d, nn.Linear)):
        return Size(0, 0)
    coming = inputs[0].transpose(0, 1).flatten(1).ne(0).any(1)  # by channel
    filters = (module.weight != 0).flatten(2).any(2) if isinstance(module, nn.Conv2d) else module.weight != 0
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        per_group = coming.view(module.groups, -1)
        filters = filters & per_group.repeat_interleave(module.out_channels // module.groups, 0)
    else:
        filters = filters & coming
    weights = int(filters.sum()) * module.weight[0, 0].numel()
    biases = 0 if module.bias is None else module.bias.numel()
    return Size(weights + biases, weights * (output[0, 0].numel() if isinstance(module, nn.Conv2d) else 1))

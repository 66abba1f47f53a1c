"""What is left of a masked network: the parameters and multiply-adds of what ``fp.shrink`` makes of it."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import torch_flowprune as fp


@dataclass(frozen=True)
class Size:
    """Counts of the network that is left.

    Attributes:
        parameters: all of the smaller network's.
        macs: multiply-adds of its convolutions and linear layers for one image.
    """

    parameters: int
    macs: int


def _alike(model: nn.Module) -> nn.Module:
    """A copy with the same masks and small values: what is counted, also where a run has broken down."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.1 / parameter[0].numel() if parameter.dim() > 1 else 0.1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    return model


def size(model: nn.Module, shape: tuple[int, ...] = (3, 32, 32)) -> Size:
    """Build the smaller network, and count.

    Only what can be removed counts as gone: a filter in front of an addition stays as long as the other side of the
    addition has its channel. (The paper's code counted every zeroed filter; an idealised count of living filters over
    living inputs is 31 to 41 % too low on a ResNet-20.)
    """
    example = torch.zeros(2, *shape, device=next(model.parameters()).device)
    built = model
    if fp.masks(model):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # where no channel is dead, the masks stay
            built = fp.shrink(_alike(model), example)
    modes = [(module, module.training) for module in built.modules()]
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        built.eval()(example)
    for module, mode in modes:
        module.training = mode
    return Size(sum(parameter.numel() for parameter in built.parameters()), counter.get_total_flops() // 4)

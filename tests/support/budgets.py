"""A net and data for which a budget of memory bites, and the smallest budget there is."""

import pytest
import torch
from torch import nn

import torch_flowprune as fp
from torch_flowprune.gradients.batches.memory_budget import in_bytes


def wide_net():
    """Activations outweigh the weights, so that a budget bites."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).double().eval()


def images(*sizes):
    return [(torch.randn(size, 3, 16, 16, dtype=torch.float64), torch.arange(size) % 3) for size in sizes]


def least(model, data, **options):
    """The smallest budget, as the error tells it."""
    with pytest.raises(
        ValueError,
        match=r"max_memory of .* is not enough: the sums .* take .*, and one sample .* more; allow (.*), or keep",
    ) as error:
        fp.flow(model, data, max_memory=1, **options)
    return in_bytes(str(error.value).split("allow ")[1].split(",")[0])

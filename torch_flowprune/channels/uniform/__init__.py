"""Sizes that a model's class can be built with, where every layer of a repeated block gives up equally much."""

from torch_flowprune.channels.uniform.dials import Dial, UniformSizes
from torch_flowprune.channels.uniform.tried_sizes import uniform_sizes

__all__ = [
    "Dial",
    "UniformSizes",
    "uniform_sizes",
]

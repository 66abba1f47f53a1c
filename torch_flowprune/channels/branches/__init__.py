"""Residual branches: what is added to what is passed on, read off a model's graph."""

from torch_flowprune.channels.branches.reading_branches import Owned, read_branches
from torch_flowprune.channels.branches.residual_sums import Region, SumOf, is_sum, sum_of
from torch_flowprune.channels.branches.running_graph import RunningGraph, shape_of
from torch_flowprune.channels.branches.vanishing import zeros_among

__all__ = ["Owned", "Region", "RunningGraph", "SumOf", "is_sum", "read_branches", "shape_of", "sum_of", "zeros_among"]

"""The passes over the data: the one place that runs the model on them."""

from torch_flowprune.gradients.sweeping.halved_sweeps import HalvedSweeps
from torch_flowprune.gradients.sweeping.input_moments import MOMENTS
from torch_flowprune.gradients.sweeping.products import Products, ProposedCut
from torch_flowprune.gradients.sweeping.sharded_sweeps import products_over

__all__ = [
    "MOMENTS",
    "HalvedSweeps",
    "Products",
    "ProposedCut",
    "products_over",
]

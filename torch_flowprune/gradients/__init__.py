"""The flow of a model over data: θ, g, H·g, squared gradients."""

from torch_flowprune.gradients.gradient_flow import INGREDIENTS, Flow, flow
from torch_flowprune.gradients.sweeps import Sweeps

__all__ = ["INGREDIENTS", "Flow", "Sweeps", "flow"]

"""The flow of a model over data: θ, g, H·g, squared gradients."""

from torch_flowprune.gradients.flow_source import FlowOptions, FlowSource, LossOptions, SweepOptions
from torch_flowprune.gradients.gradient_flow import INGREDIENTS, Flow, flow, flow_over
from torch_flowprune.gradients.loss_weights import LossWeights
from torch_flowprune.gradients.sweeps import Sweeps

__all__ = [
    "INGREDIENTS",
    "Flow",
    "FlowOptions",
    "FlowSource",
    "LossOptions",
    "LossWeights",
    "SweepOptions",
    "Sweeps",
    "flow",
    "flow_over",
]

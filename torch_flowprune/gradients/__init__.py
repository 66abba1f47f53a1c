"""The flow of a model over data: θ, g, H·g, squared gradients."""

from torch_flowprune.gradients.batches import LossWeights, Reduction, other_mode_told
from torch_flowprune.gradients.differentiable import differentiable
from torch_flowprune.gradients.flow_source import FlowOptions, FlowSource, LossOptions, SweepOptions
from torch_flowprune.gradients.gradient_flow import INGREDIENTS, Flow, flow, flow_over, point_of
from torch_flowprune.gradients.halved_flow import HalvedFlow, expansions_along, halved_flow
from torch_flowprune.gradients.hessian_vector import hessian_vector
from torch_flowprune.gradients.operators import sound_norms
from torch_flowprune.gradients.sharding import DataRanks, in_shards, theta_of
from torch_flowprune.gradients.sweeping import MOMENTS, ProposedCut

__all__ = [
    "INGREDIENTS",
    "MOMENTS",
    "DataRanks",
    "Flow",
    "FlowOptions",
    "FlowSource",
    "HalvedFlow",
    "LossOptions",
    "LossWeights",
    "ProposedCut",
    "Reduction",
    "SweepOptions",
    "differentiable",
    "expansions_along",
    "flow",
    "flow_over",
    "halved_flow",
    "hessian_vector",
    "in_shards",
    "other_mode_told",
    "point_of",
    "sound_norms",
    "theta_of",
]

"""Operators whose derivatives torch lacks or gets wrong."""

from torch_flowprune.gradients.operators.bilinear_operators import Bilinear, Gradients, convolution_of, is_plain
from torch_flowprune.gradients.operators.double_backward import check_twice, twice_differentiable
from torch_flowprune.gradients.operators.lost_graphs import no_lost_graph
from torch_flowprune.gradients.operators.one_sample_norms import sound_norms

__all__ = [
    "Bilinear",
    "Gradients",
    "check_twice",
    "convolution_of",
    "is_plain",
    "no_lost_graph",
    "sound_norms",
    "twice_differentiable",
]

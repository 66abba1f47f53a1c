"""What is left of a pruned model, set right: statistics, kept weights, constants."""

from torch_flowprune.pruning.corrections.folded_constants import FoldedConstants, FoldedLayer, fold_constants
from torch_flowprune.pruning.corrections.recalibration import recalibrate
from torch_flowprune.pruning.corrections.reconstruction import LayerReconstruction, Reconstruction, reconstruct

__all__ = [
    "FoldedConstants",
    "FoldedLayer",
    "LayerReconstruction",
    "Reconstruction",
    "fold_constants",
    "recalibrate",
    "reconstruct",
]

"""The whole route in one call, in rounds, and as torch's pruning methods."""

from torch_flowprune.pruning import methods, regularizers
from torch_flowprune.pruning.current_sparsity import report
from torch_flowprune.pruning.expert_removal import RemovedExperts, remove_experts
from torch_flowprune.pruning.folded_constants import FoldedConstants, FoldedLayer, fold_constants
from torch_flowprune.pruning.global_pruning import global_prune
from torch_flowprune.pruning.recalibration import recalibrate
from torch_flowprune.pruning.reconstruction import LayerReconstruction, Reconstruction, reconstruct
from torch_flowprune.pruning.regrowth import regrow
from torch_flowprune.pruning.report import Layer, Report, Spent, blank_figure
from torch_flowprune.pruning.report_warnings import (
    LayerCollapseWarning,
    TiedScoresWarning,
    warn_of_collapse,
    warn_of_ties,
)
from torch_flowprune.pruning.route import prune_to
from torch_flowprune.pruning.training import Pruner

__all__ = [
    "FoldedConstants",
    "FoldedLayer",
    "Layer",
    "LayerCollapseWarning",
    "LayerReconstruction",
    "Pruner",
    "Reconstruction",
    "RemovedExperts",
    "Report",
    "Spent",
    "TiedScoresWarning",
    "blank_figure",
    "fold_constants",
    "global_prune",
    "methods",
    "prune_to",
    "recalibrate",
    "reconstruct",
    "regrow",
    "regularizers",
    "remove_experts",
    "report",
    "warn_of_collapse",
    "warn_of_ties",
]

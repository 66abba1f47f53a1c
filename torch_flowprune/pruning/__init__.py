"""The whole route in one call, in rounds, and as torch's pruning methods."""

from torch_flowprune.pruning import methods, regularizers
from torch_flowprune.pruning.corrections import (
    FoldedConstants,
    FoldedLayer,
    LayerReconstruction,
    Reconstruction,
    fold_constants,
    recalibrate,
    reconstruct,
)
from torch_flowprune.pruning.current_sparsity import report
from torch_flowprune.pruning.experts import RemovedExperts, remove_experts
from torch_flowprune.pruning.global_pruning import global_prune
from torch_flowprune.pruning.regrowth import regrow
from torch_flowprune.pruning.reports import (
    Layer,
    LayerCollapseWarning,
    Report,
    Spent,
    TiedScoresWarning,
    blank_figure,
    warn_of_collapse,
    warn_of_ties,
)
from torch_flowprune.pruning.route import prune_to
from torch_flowprune.pruning.training import Pruner, check_callback_words

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
    "check_callback_words",
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

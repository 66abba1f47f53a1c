"""Decide what to prune, and live with the pruned model: gradient-flow pruning for PyTorch."""

from torch_flowprune.analysis import (
    Comparison,
    Diagnosis,
    LayerDiagnosis,
    Outcome,
    Prediction,
    Sensitivity,
    SizeRange,
    compare,
    diagnose,
    predict,
    sensitivity,
)
from torch_flowprune.analysis import size_range as range  # noqa: A004, F401 - a star import leaves Python's
from torch_flowprune.channels import (
    Coupling,
    Group,
    LatencyTable,
    ShrinkError,
    Size,
    Slice,
    couple,
    describe,
    load_shrunk,
    rebuild,
    save_shrunk,
    shrink,
)
from torch_flowprune.checkpoints import prune_checkpoint
from torch_flowprune.exporting import Exported, export, load_pruned, save_pruned, to_semi_structured
from torch_flowprune.gradients import Flow, flow, hessian_vector
from torch_flowprune.inputs import class_balanced
from torch_flowprune.masking import (
    accept_masks,
    apply_masks,
    export_ready,
    keep_zeros,
    load_state_dict,
    masks,
    remove,
    state_dict,
    sync_masks,
)
from torch_flowprune.pruning import (
    Layer,
    LayerCollapseWarning,
    LayerReconstruction,
    Pruner,
    Reconstruction,
    Report,
    Spent,
    TiedScoresWarning,
    global_prune,
    recalibrate,
    reconstruct,
    regrow,
    report,
)
from torch_flowprune.pruning import methods as _methods
from torch_flowprune.pruning import regularizers as regularizers  # a module: fp.regularizers.GroupLasso
from torch_flowprune.pruning.methods import *  # noqa: F403
from torch_flowprune.scoring import MEASURES, Blocks, Scores, Slices, Weights, importance_scores, scores
from torch_flowprune.selection import SCHEDULES

__version__ = "0.1.0"

__all__ = [
    "MEASURES",
    "SCHEDULES",
    "Blocks",
    "Comparison",
    "Coupling",
    "Diagnosis",
    "Exported",
    "Flow",
    "Group",
    "LatencyTable",
    "Layer",
    "LayerCollapseWarning",
    "LayerDiagnosis",
    "LayerReconstruction",
    "Outcome",
    "Prediction",
    "Pruner",
    "Reconstruction",
    "Report",
    "Scores",
    "Sensitivity",
    "ShrinkError",
    "Size",
    "SizeRange",
    "Slice",
    "Slices",
    "Spent",
    "TiedScoresWarning",
    "Weights",
    "accept_masks",
    "apply_masks",
    "class_balanced",
    "compare",
    "couple",
    "describe",
    "diagnose",
    "export",
    "export_ready",
    "flow",
    "global_prune",
    "hessian_vector",
    "importance_scores",
    "keep_zeros",
    "load_pruned",
    "load_shrunk",
    "load_state_dict",
    "masks",
    "predict",
    "prune_checkpoint",
    "rebuild",
    "recalibrate",
    "reconstruct",
    "regrow",
    "remove",
    "report",
    "save_pruned",
    "save_shrunk",
    "scores",
    "sensitivity",
    "shrink",
    "state_dict",
    "sync_masks",
    "to_semi_structured",
]
__all__ += _methods.__all__

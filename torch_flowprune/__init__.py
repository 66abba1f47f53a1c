"""Decide what to prune, and live with the pruned model: gradient-flow pruning for PyTorch."""

from torch_flowprune import methods as _methods
from torch_flowprune.comparison import Comparison, Outcome, compare
from torch_flowprune.coupling import couple
from torch_flowprune.data import class_balanced
from torch_flowprune.diagnosis import Diagnosis, LayerDiagnosis, diagnose
from torch_flowprune.flow import Flow, flow
from torch_flowprune.groups import Coupling, Group, Slice
from torch_flowprune.masking import apply_masks, remove
from torch_flowprune.measures import MEASURES
from torch_flowprune.methods import *  # noqa: F403
from torch_flowprune.prediction import Prediction, predict
from torch_flowprune.proof import ShrinkError
from torch_flowprune.pruner import Pruner
from torch_flowprune.pruning import LayerCollapseWarning, TiedScoresWarning, global_prune
from torch_flowprune.report import Layer, Report, Size
from torch_flowprune.schedules import SCHEDULES
from torch_flowprune.scoring import Scores, importance_scores, scores
from torch_flowprune.shrink import shrink
from torch_flowprune.state import load_state_dict, masks, state_dict
from torch_flowprune.units import Blocks, Slices, Weights
from torch_flowprune.zeros import keep_zeros

__version__ = "0.1.0"

__all__ = [
    "MEASURES",
    "SCHEDULES",
    "Blocks",
    "Comparison",
    "Coupling",
    "Diagnosis",
    "Flow",
    "Group",
    "Layer",
    "LayerCollapseWarning",
    "LayerDiagnosis",
    "Outcome",
    "Prediction",
    "Pruner",
    "Report",
    "Scores",
    "ShrinkError",
    "Size",
    "Slice",
    "Slices",
    "TiedScoresWarning",
    "Weights",
    "apply_masks",
    "class_balanced",
    "compare",
    "couple",
    "diagnose",
    "flow",
    "global_prune",
    "importance_scores",
    "keep_zeros",
    "load_state_dict",
    "masks",
    "predict",
    "remove",
    "scores",
    "shrink",
    "state_dict",
]
__all__ += _methods.__all__

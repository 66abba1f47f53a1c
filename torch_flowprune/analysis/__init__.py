"""What a prune would do, before it is done."""

from torch_flowprune.analysis.comparison import DEFAULT_MEASURES, Comparison, Outcome, compare
from torch_flowprune.analysis.diagnosis import Diagnosis, LayerDiagnosis, diagnose
from torch_flowprune.analysis.layer_losses import Sensitivity, sensitivity
from torch_flowprune.analysis.prediction import Prediction, predict
from torch_flowprune.analysis.size_range import SizeRange, size_range

__all__ = [
    "DEFAULT_MEASURES",
    "Comparison",
    "Diagnosis",
    "LayerDiagnosis",
    "Outcome",
    "Prediction",
    "Sensitivity",
    "SizeRange",
    "compare",
    "diagnose",
    "predict",
    "sensitivity",
    "size_range",
]

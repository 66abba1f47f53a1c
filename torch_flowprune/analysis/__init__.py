"""What a prune would do, before it is done."""

from torch_flowprune.analysis.comparison import DEFAULT_MEASURES, Comparison, Outcome, compare
from torch_flowprune.analysis.diagnosis import Diagnosis, LayerDiagnosis, diagnose
from torch_flowprune.analysis.prediction import Prediction, predict

__all__ = [
    "DEFAULT_MEASURES",
    "Comparison",
    "Diagnosis",
    "LayerDiagnosis",
    "Outcome",
    "Prediction",
    "compare",
    "diagnose",
    "predict",
]

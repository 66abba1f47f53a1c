"""What removing a unit costs: the measures, the units, their scores."""

from torch_flowprune.scoring import measures
from torch_flowprune.scoring.candidates import Candidate, Candidates, label, lefts, living, targets_of
from torch_flowprune.scoring.granularity import Blocks, Granularity, Slices, Units, Weights, alive, parse_granularity
from torch_flowprune.scoring.importance import (
    Scores,
    candidates_of,
    evaluate,
    given,
    importance_scores,
    on_access,
    scores,
)
from torch_flowprune.scoring.measures import MEASURES, Measure
from torch_flowprune.scoring.stacked_scores import (
    WORD,
    LayerScores,
    Stack,
    bases,
    not_finite,
    notes,
    on_host,
    parts_of,
    stacks,
)

__all__ = [
    "MEASURES",
    "WORD",
    "Blocks",
    "Candidate",
    "Candidates",
    "Granularity",
    "LayerScores",
    "Measure",
    "Scores",
    "Slices",
    "Stack",
    "Units",
    "Weights",
    "alive",
    "bases",
    "candidates_of",
    "evaluate",
    "given",
    "importance_scores",
    "label",
    "lefts",
    "living",
    "measures",
    "not_finite",
    "notes",
    "on_access",
    "on_host",
    "parse_granularity",
    "parts_of",
    "scores",
    "stacks",
    "targets_of",
]

"""What removing a unit costs: the measures, the units, their scores."""

from torch_flowprune.scoring import measure_lookup, measures
from torch_flowprune.scoring.candidates import (
    Candidate,
    Candidates,
    Origin,
    changes,
    counted_from,
    label,
    lefts,
    living,
    masks_of,
    ranks_of,
    targets_of,
    totals,
)
from torch_flowprune.scoring.evaluation import all_stored, evaluate, on_access
from torch_flowprune.scoring.granularity import Blocks, Granularity, Slices, Units, Weights, alive, parse_granularity
from torch_flowprune.scoring.importance import ScoreOptions, importance_scores, scores
from torch_flowprune.scoring.measures import MEASURES, Measure
from torch_flowprune.scoring.prunable_units import PrunableUnits, UnitOptions
from torch_flowprune.scoring.stacked import (
    WORD,
    Computed,
    LayerScores,
    Stack,
    bases,
    not_finite,
    notes,
    numbers,
    parts_of,
    read_on_host,
    stacks,
)
from torch_flowprune.scoring.unit_scores import Scores, given, granularity_of

__all__ = [
    "MEASURES",
    "WORD",
    "Blocks",
    "Candidate",
    "Candidates",
    "Computed",
    "Granularity",
    "LayerScores",
    "Measure",
    "Origin",
    "PrunableUnits",
    "ScoreOptions",
    "Scores",
    "Slices",
    "Stack",
    "UnitOptions",
    "Units",
    "Weights",
    "alive",
    "all_stored",
    "bases",
    "changes",
    "counted_from",
    "evaluate",
    "given",
    "granularity_of",
    "importance_scores",
    "label",
    "lefts",
    "living",
    "masks_of",
    "measure_lookup",
    "measures",
    "not_finite",
    "notes",
    "numbers",
    "on_access",
    "parse_granularity",
    "parts_of",
    "ranks_of",
    "read_on_host",
    "scores",
    "stacks",
    "targets_of",
    "totals",
]

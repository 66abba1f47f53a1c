"""Scores of many layers, read in parts."""

from torch_flowprune.scoring.stacked.drawn_scores import DrawnScores
from torch_flowprune.scoring.stacked.stacked_scores import (
    WORD,
    Computed,
    LayerScores,
    Stack,
    as_given,
    bases,
    not_finite,
    notes,
    numbers,
    parts_of,
    read_on_host,
    stacks,
)

__all__ = [
    "WORD",
    "Computed",
    "DrawnScores",
    "LayerScores",
    "Stack",
    "as_given",
    "bases",
    "not_finite",
    "notes",
    "numbers",
    "parts_of",
    "read_on_host",
    "stacks",
]

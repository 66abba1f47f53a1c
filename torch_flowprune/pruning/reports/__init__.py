"""What a prune did: the report, and what is warned of."""

from torch_flowprune.pruning.reports.report import Layer, Report, Spent, blank_figure
from torch_flowprune.pruning.reports.report_warnings import (
    LayerCollapseWarning,
    TiedScoresWarning,
    warn_of_collapse,
    warn_of_lost_zeros,
    warn_of_ties,
)

__all__ = [
    "Layer",
    "LayerCollapseWarning",
    "Report",
    "Spent",
    "TiedScoresWarning",
    "blank_figure",
    "warn_of_collapse",
    "warn_of_lost_zeros",
    "warn_of_ties",
]

"""How much is removed from which layers, and which units."""

from torch_flowprune.selection.allocation import Choice, check_rounds, choose, counted, floors, gone_share, pools
from torch_flowprune.selection.budget import COSTS, living_units
from torch_flowprune.selection.lowest_k import lowest
from torch_flowprune.selection.sampled_bracket import numbers
from torch_flowprune.selection.schedules import SCHEDULES, Schedule, fraction, steps, to_prune

__all__ = [
    "COSTS",
    "SCHEDULES",
    "Choice",
    "Schedule",
    "check_rounds",
    "choose",
    "counted",
    "floors",
    "fraction",
    "gone_share",
    "living_units",
    "lowest",
    "numbers",
    "pools",
    "steps",
    "to_prune",
]

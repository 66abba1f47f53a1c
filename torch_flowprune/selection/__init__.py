"""How much is removed from which layers, and which units."""

from torch_flowprune.selection.allocation import Allocation, AllocationOptions, SharedOut, gone_share, total_of
from torch_flowprune.selection.allowances import AtMost
from torch_flowprune.selection.budget import living_units
from torch_flowprune.selection.choice import Choice, choose, counted
from torch_flowprune.selection.goal import Goal
from torch_flowprune.selection.meters import COSTS
from torch_flowprune.selection.plan import Plan, Pool
from torch_flowprune.selection.ranking import lowest
from torch_flowprune.selection.rules import LayerUnits, PerLayer
from torch_flowprune.selection.schedules import SCHEDULES, Schedule, check_listed, fraction, listed, steps, to_prune

__all__ = [
    "COSTS",
    "SCHEDULES",
    "Allocation",
    "AllocationOptions",
    "AtMost",
    "Choice",
    "Goal",
    "LayerUnits",
    "PerLayer",
    "Plan",
    "Pool",
    "Schedule",
    "SharedOut",
    "check_listed",
    "choose",
    "counted",
    "fraction",
    "gone_share",
    "listed",
    "living_units",
    "lowest",
    "steps",
    "to_prune",
    "total_of",
]

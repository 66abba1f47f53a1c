"""Residual branches that nothing is left of, taken out of a model."""

from torch_flowprune.channels.shrinking.removed_branches.dead_branches import TakenOut, taken_out
from torch_flowprune.channels.shrinking.removed_branches.stand_in import HANDED_ON, StandIn, StandInSpec, with_stand_ins

__all__ = ["HANDED_ON", "StandIn", "StandInSpec", "TakenOut", "taken_out", "with_stand_ins"]

"""What may be removed from a model, whatever its kind: out as rows for the measures, back as masks."""

from torch_flowprune.scoring.candidates.branch_units import BranchUnit, block_candidates
from torch_flowprune.scoring.candidates.candidate import (
    Alike,
    Candidate,
    Candidates,
    label,
    masks_of,
    targets_of,
)
from torch_flowprune.scoring.candidates.group_units import GroupUnits, channel_candidates
from torch_flowprune.scoring.candidates.parameter_units import parameter_candidates
from torch_flowprune.scoring.candidates.shard_groups import ShardedBranch, ShardedGroup
from torch_flowprune.scoring.candidates.shard_units import ShardUnits, all_living, lefts, ranks_of, totals
from torch_flowprune.scoring.candidates.survivors import Origin, changes, counted_from

__all__ = [
    "Alike",
    "BranchUnit",
    "Candidate",
    "Candidates",
    "GroupUnits",
    "Origin",
    "ShardUnits",
    "ShardedBranch",
    "ShardedGroup",
    "all_living",
    "block_candidates",
    "changes",
    "channel_candidates",
    "counted_from",
    "label",
    "lefts",
    "masks_of",
    "parameter_candidates",
    "ranks_of",
    "targets_of",
    "totals",
]

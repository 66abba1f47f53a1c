"""Masks on a model and off it, and what has to keep step with them: checkpoints, optimizers."""

from torch_flowprune.masking.apply import apply_masks
from torch_flowprune.masking.checkpoint import load_state_dict, masks, state_dict
from torch_flowprune.masking.checks import check_can_mask, fitting
from torch_flowprune.masking.dense import dense_copy, remove, write_zeros
from torch_flowprune.masking.hook import put_on
from torch_flowprune.masking.optimizer_zeros import held_by, keep_zeros
from torch_flowprune.masking.snapshots import all_or_nothing, restored

__all__ = [
    "all_or_nothing",
    "apply_masks",
    "check_can_mask",
    "dense_copy",
    "fitting",
    "held_by",
    "keep_zeros",
    "load_state_dict",
    "masks",
    "put_on",
    "remove",
    "restored",
    "state_dict",
    "write_zeros",
]

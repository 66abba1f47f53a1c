"""Masks on a model and off it, and what has to keep step with them: checkpoints, optimizers, averages."""

from torch_flowprune.masking.apply import apply_masks, put_masks, set_mask
from torch_flowprune.masking.carrier import put_on, quiet_subclass
from torch_flowprune.masking.checks import all_fitting, check_can_mask
from torch_flowprune.masking.dense import dense_copy, remove, write_zeros
from torch_flowprune.masking.export import export_ready
from torch_flowprune.masking.kernels_used import LostZeros, lost_zeros
from torch_flowprune.masking.optimizer_zeros import held_by, holders, keep_zeros, zero_grown
from torch_flowprune.masking.packed_bits import pack, unpack
from torch_flowprune.masking.pretrained_files import MASKS_FILE
from torch_flowprune.masking.snapshots import all_or_nothing, restored
from torch_flowprune.masking.states import accept_masks, averaged_model, load_state_dict, masks, state_dict, sync_masks

__all__ = [
    "MASKS_FILE",
    "LostZeros",
    "accept_masks",
    "all_fitting",
    "all_or_nothing",
    "apply_masks",
    "averaged_model",
    "check_can_mask",
    "dense_copy",
    "export_ready",
    "held_by",
    "holders",
    "keep_zeros",
    "load_state_dict",
    "lost_zeros",
    "masks",
    "pack",
    "put_masks",
    "put_on",
    "quiet_subclass",
    "remove",
    "restored",
    "set_mask",
    "state_dict",
    "sync_masks",
    "unpack",
    "write_zeros",
    "zero_grown",
]

"""Masks in states that others keep: checkpoints, frameworks' files, averages."""

from torch_flowprune.masking.states.accepting import accept_masks
from torch_flowprune.masking.states.averages import averaged_model, sync_masks
from torch_flowprune.masking.states.checkpoint import load_state_dict, masks, masks_on, state_dict

__all__ = ["accept_masks", "averaged_model", "load_state_dict", "masks", "masks_on", "state_dict", "sync_masks"]

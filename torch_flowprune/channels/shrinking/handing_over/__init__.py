"""Who knew the model before it was shrunk, and knows it after."""

from torch_flowprune.channels.shrinking.handing_over.handover import Follower, Handover, Optimizers, is_left_behind
from torch_flowprune.channels.shrinking.handing_over.stated_sizes import is_as_built, state_sizes

__all__ = [
    "Follower",
    "Handover",
    "Optimizers",
    "is_as_built",
    "is_left_behind",
    "state_sizes",
]

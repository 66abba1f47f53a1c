"""Who knew the model before it was shrunk, and knows it after."""

from torch_flowprune.channels.shrinking.handing_over.handover import Follower, Handover, Optimizers, is_left_behind

__all__ = [
    "Follower",
    "Handover",
    "Optimizers",
    "is_left_behind",
]

"""Dead channels removed, and the outputs proved equal."""

from torch_flowprune.channels.shrinking.handing_over import is_as_built, is_left_behind, state_sizes
from torch_flowprune.channels.shrinking.removal import shrink
from torch_flowprune.channels.shrinking.removed_branches import StandIn
from torch_flowprune.channels.shrinking.saving import describe, made_like, own_description, rebuild, replaced_modules
from torch_flowprune.channels.shrinking.surgery import ShrinkError, Surgery
from torch_flowprune.channels.shrinking.written import (
    NarrowAttention,
    NarrowGroupNorm,
    NarrowLayerNorm,
    NarrowRMSNorm,
    register,
)

__all__ = [
    "NarrowAttention",
    "NarrowGroupNorm",
    "NarrowLayerNorm",
    "NarrowRMSNorm",
    "ShrinkError",
    "StandIn",
    "Surgery",
    "describe",
    "is_as_built",
    "is_left_behind",
    "made_like",
    "own_description",
    "rebuild",
    "register",
    "replaced_modules",
    "shrink",
    "state_sizes",
]

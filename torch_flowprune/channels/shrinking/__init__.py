"""Dead channels removed, and the outputs proved equal."""

from torch_flowprune.channels.shrinking.handover import is_left_behind
from torch_flowprune.channels.shrinking.removal import shrink
from torch_flowprune.channels.shrinking.surgery import ShrinkError, Surgery

__all__ = ["ShrinkError", "Surgery", "is_left_behind", "shrink"]

"""Dead channels removed, and the outputs proved equal."""

from torch_flowprune.channels.shrinking.equivalence import ShrinkError
from torch_flowprune.channels.shrinking.removal import shrink

__all__ = ["ShrinkError", "shrink"]

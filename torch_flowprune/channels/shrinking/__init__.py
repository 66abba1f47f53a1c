"""Dead channels removed, and the outputs proved equal."""

from torch_flowprune.channels.shrinking.removal import shrink
from torch_flowprune.channels.shrinking.surgery import ShrinkError

__all__ = ["ShrinkError", "shrink"]

"""Dead channels removed, and the outputs proved equal."""

from torch_flowprune.channels.shrinking.architecture import describe, rebuild
from torch_flowprune.channels.shrinking.handover import is_left_behind
from torch_flowprune.channels.shrinking.narrow_attention import NarrowAttention
from torch_flowprune.channels.shrinking.removal import shrink
from torch_flowprune.channels.shrinking.replaced_modules import replaced_modules
from torch_flowprune.channels.shrinking.shrunk_files import load_shrunk, save_shrunk
from torch_flowprune.channels.shrinking.surgery import ShrinkError, Surgery
from torch_flowprune.channels.shrinking.written_modules import register

__all__ = [
    "NarrowAttention",
    "ShrinkError",
    "Surgery",
    "describe",
    "is_left_behind",
    "load_shrunk",
    "rebuild",
    "register",
    "replaced_modules",
    "save_shrunk",
    "shrink",
]

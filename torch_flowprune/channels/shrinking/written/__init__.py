"""Modules written for sizes that torch's own classes cannot state."""

from torch_flowprune.channels.shrinking.written.narrow_attention import NarrowAttention
from torch_flowprune.channels.shrinking.written.narrow_norms import NarrowGroupNorm, NarrowLayerNorm, NarrowRMSNorm
from torch_flowprune.channels.shrinking.written.written_modules import (
    paths_of_written,
    register,
    written,
    written_anew,
    written_paths,
)

__all__ = [
    "NarrowAttention",
    "NarrowGroupNorm",
    "NarrowLayerNorm",
    "NarrowRMSNorm",
    "paths_of_written",
    "register",
    "written",
    "written_anew",
    "written_paths",
]

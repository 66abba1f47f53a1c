"""A shrunk model described, and in a file."""

from torch_flowprune.channels.shrinking.saving.architecture import describe, rebuild
from torch_flowprune.channels.shrinking.saving.replaced_modules import replaced_modules
from torch_flowprune.channels.shrinking.saving.shrunk_files import load_shrunk, save_shrunk

__all__ = [
    "describe",
    "load_shrunk",
    "rebuild",
    "replaced_modules",
    "save_shrunk",
]

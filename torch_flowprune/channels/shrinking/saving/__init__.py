"""What a shrunk model is beside its weights: beside the dense one, or said by itself, for a file."""

from torch_flowprune.channels.shrinking.saving.architecture import describe, rebuild
from torch_flowprune.channels.shrinking.saving.own_description import made_like, own_description
from torch_flowprune.channels.shrinking.saving.replaced_modules import replaced_modules

__all__ = [
    "describe",
    "made_like",
    "own_description",
    "rebuild",
    "replaced_modules",
]

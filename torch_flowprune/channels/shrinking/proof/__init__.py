"""That the smaller model computes what the masked one does."""

from torch_flowprune.channels.shrinking.proof.equivalence import (
    Trial,
    first_line,
    holds_nothing,
    tolerance_of,
    training,
)

__all__ = [
    "Trial",
    "first_line",
    "holds_nothing",
    "tolerance_of",
    "training",
]

"""That the smaller model computes what the masked one does."""

from torch_flowprune.channels.shrinking.proof.equivalence import (
    Trial,
    holds_nothing,
    tolerance_of,
    training,
)
from torch_flowprune.channels.shrinking.proof.learning import first_line, statement_of

__all__ = [
    "Trial",
    "first_line",
    "holds_nothing",
    "statement_of",
    "tolerance_of",
    "training",
]

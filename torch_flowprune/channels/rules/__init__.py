"""One rule an operator: how the labels of its operands meet in its result."""

from torch_flowprune.channels.rules.matrix import SPATIAL
from torch_flowprune.channels.rules.table import RULES

__all__ = ["RULES", "SPATIAL"]

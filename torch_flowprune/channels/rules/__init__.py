"""One rule an operator: how the labels of its operands meet in its result."""

from torch_flowprune.channels.rules.matrix import SPATIAL
from torch_flowprune.channels.rules.table import PRESERVING, RULES

__all__ = ["PRESERVING", "RULES", "SPATIAL"]

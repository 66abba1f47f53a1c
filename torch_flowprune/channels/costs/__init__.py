"""What a model costs, of the units that stay."""

from torch_flowprune.channels.costs.costs import COUNTED, Costs, Size
from torch_flowprune.channels.costs.extents import Extent, Kept, Term
from torch_flowprune.channels.costs.latency_table import LatencyTable
from torch_flowprune.channels.costs.operators import Holding, Operand, Operator

__all__ = ["COUNTED", "Costs", "Extent", "Holding", "Kept", "LatencyTable", "Operand", "Operator", "Size", "Term"]

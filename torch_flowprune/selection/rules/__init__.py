"""What decides how much a layer gives up: bounds, shares, scores made comparable, multiples."""

from torch_flowprune.selection.rules.bounds import Bounds, PerLayer, bounds_of, by_layer, check_number
from torch_flowprune.selection.rules.comparable_scores import NORMALIZERS, Comparable, comparable
from torch_flowprune.selection.rules.layer_shares import SHARE_RULES, LayerUnits, ShareRule, counted_exactly
from torch_flowprune.selection.rules.levelling import Levels
from torch_flowprune.selection.rules.rounding import multiples_of, narrowest, rounded

__all__ = [
    "NORMALIZERS",
    "SHARE_RULES",
    "Bounds",
    "Comparable",
    "LayerUnits",
    "Levels",
    "PerLayer",
    "ShareRule",
    "bounds_of",
    "by_layer",
    "check_number",
    "comparable",
    "counted_exactly",
    "multiples_of",
    "narrowest",
    "rounded",
]

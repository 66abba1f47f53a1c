"""Exactly the k lowest of many scores."""

from torch_flowprune.selection.ranking.lowest_k import (
    lowest,
    lowest_in_blocks,
    lowest_of_each,
    tied_in_blocks,
    with_floors,
)
from torch_flowprune.selection.ranking.sampled_bracket import Cut

__all__ = ["Cut", "lowest", "lowest_in_blocks", "lowest_of_each", "tied_in_blocks", "with_floors"]

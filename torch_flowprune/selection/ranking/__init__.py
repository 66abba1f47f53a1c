"""Exactly the k lowest of many scores."""

from torch_flowprune.selection.ranking.lowest_k import (
    Cut,
    lowest,
    lowest_in_blocks,
    lowest_of_each,
    tied_in_blocks,
    with_floors,
)
from torch_flowprune.selection.ranking.sampled_bracket import numbers

__all__ = ["Cut", "lowest", "lowest_in_blocks", "lowest_of_each", "numbers", "tied_in_blocks", "with_floors"]

"""What a model's operators cost, read off its graph."""

from torch_flowprune.channels.counting.counting import costs_of

__all__ = ["costs_of"]

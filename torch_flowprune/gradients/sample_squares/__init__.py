"""Sums of squared gradients of single samples, read off one pass over the batch."""

from torch_flowprune.gradients.sample_squares.sample_squares import SampleSquares

__all__ = ["SampleSquares"]

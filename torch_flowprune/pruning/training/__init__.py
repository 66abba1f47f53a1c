"""Pruning inside a training loop, in rounds."""

from torch_flowprune.pruning.training.pruner import Pruner

__all__ = ["Pruner"]

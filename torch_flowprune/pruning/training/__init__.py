"""Pruning inside a training loop, in rounds."""

from torch_flowprune.pruning.training.pruner import Pruner
from torch_flowprune.pruning.training.words_of_callbacks import check_callback_words

__all__ = ["Pruner", "check_callback_words"]

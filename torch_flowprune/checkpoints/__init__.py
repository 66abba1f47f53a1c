"""Folders of safetensors shards pruned where they lie, without a model, a shard at a time."""

from torch_flowprune.checkpoints.prune_checkpoint import prune_checkpoint

__all__ = ["prune_checkpoint"]

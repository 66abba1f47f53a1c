"""Whole experts of a mixture."""

from torch_flowprune.pruning.experts.expert_removal import RemovedExperts, remove_experts

__all__ = ["RemovedExperts", "remove_experts"]

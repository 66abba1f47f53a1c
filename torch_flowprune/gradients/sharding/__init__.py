"""Derivatives of models that ranks hold in parts, under ``fully_shard`` and tensor parallelism."""

from torch_flowprune.gradients.sharding.data_ranks import DataRanks, Parts
from torch_flowprune.gradients.sharding.refusals import check_in_parts
from torch_flowprune.gradients.sharding.sharded_derivatives import ShardedDerivatives
from torch_flowprune.gradients.sharding.sharded_model import ShardedModel
from torch_flowprune.gradients.sharding.sharded_modules import in_shards, is_in_parts
from torch_flowprune.gradients.sharding.shards import Shard, theta_of

__all__ = [
    "DataRanks",
    "Parts",
    "Shard",
    "ShardedDerivatives",
    "ShardedModel",
    "check_in_parts",
    "in_shards",
    "is_in_parts",
    "theta_of",
]

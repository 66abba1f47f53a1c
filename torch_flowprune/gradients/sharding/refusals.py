"""What cannot be had of a model that ranks hold in parts, said before anything is touched."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable

import torch
from torch import nn

from torch_flowprune.gradients.flow_source import FlowSource
from torch_flowprune.gradients.sharding.sharded_modules import fully_sharded, is_in_parts
from torch_flowprune.inputs import Ranks, local, users_level
from torch_flowprune.torch_internals import sharded_parameters


def check_in_parts(model: nn.Module, source: FlowSource, wanted: set[str], ranks: Ranks) -> None:
    """An error for how derivatives are not taken of a sharded model; of a whole one nothing is said.

    Raises:
        ValueError: saying how to get it.
    """
    if wanted:
        _check_no_older_sharding(model)
    if not wanted or not is_in_parts(model):
        return
    for word, value in (("max_memory", source.max_memory), ("offload", source.offload), ("check", source.check)):
        if value:
            raise ValueError(
                f"{word}= is for models that are not sharded, and this one is: leave it out, and use smaller batches "
                "or more ranks if memory is short"
            )
    if not ranks.alone:
        raise ValueError(
            "DistributedDataParallel around a sharded model: leave it out, and give fully_shard a mesh of two axes "
            "(replicas, shards)"
        )
    if any(parameter.dtype is torch.float16 for parameter in model.parameters()):
        raise ValueError("derivatives of a float16 model underflow: shard model.float() or model.bfloat16()")
    _check_policies(fully_sharded(model))


def _check_policies(modules: Iterable[nn.Module]) -> None:
    kept = [one for module in modules for one in sharded_parameters(module)]
    if any(one.on_host for one in kept):
        raise ValueError(
            "fully_shard keeps this model's shards on the host (CPUOffloadPolicy), where derivatives cannot be summed: "
            "score before fully_shard, or shard without offload_policy="
        )
    for one in kept:
        if (kind := type(local(one.parameter))) is not torch.Tensor:
            raise ValueError(
                f"shards of {kind.__name__} are gathered in their own way, which is not supported: score before they "
                "are set up"
            )
    if any(one.in_fewer_digits for one in kept):
        warnings.warn(
            "the mixed-precision policy of fully_shard is ignored here: the model runs in its parameters' own "
            "dtype; autocast=torch.bfloat16 runs it in mixed precision",
            UserWarning,
            stacklevel=users_level(),
        )


def _check_no_older_sharding(model: nn.Module) -> None:
    """An error for ``FullyShardedDataParallel``, whose flat parameters have neither shapes nor names of their own."""
    older = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
    if older is not None and any(isinstance(module, older) for module in model.modules()):
        raise ValueError(
            "FullyShardedDataParallel keeps flat pieces of parameters, which cannot be differentiated here: shard "
            "the model with torch.distributed.fsdp.fully_shard, or score before it is sharded"
        )

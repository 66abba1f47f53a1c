"""Which parts of a model ranks hold in parts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from torch_flowprune.inputs import is_sharded
from torch_flowprune.torch_internals import sharded_parameters


def is_in_parts(model: nn.Module) -> bool:
    """Whether ranks hold parts of it: ``fully_shard``, or tensor parallelism."""
    return bool(fully_sharded(model)) or any(map(is_sharded, model.parameters()))


@contextmanager
def in_shards(model: nn.Module) -> Iterator[None]:
    """Inside, modules hold their shards, as after a step; what a forward left gathered is gathered again afterwards.

    What a forward inside left gathered is not: values may have changed under it.
    """
    held, gathered = {id(parameter) for parameter in model.parameters()}, []
    for module in fully_sharded(model):
        if any(id(kept.parameter) not in held for kept in sharded_parameters(module)):
            gathered.append(module)
            module.reshard()
    try:
        yield
    finally:
        for module in fully_sharded(model):
            module.unshard() if module in gathered else module.reshard()


def fully_sharded(model: nn.Module) -> list[Any]:
    """The modules that ``fully_shard`` was called on, from the outermost."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return [] if kind is None else [module for module in model.modules() if isinstance(module, kind)]

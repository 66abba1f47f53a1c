"""The gradient of the synaptic-flow objective, of a model that ranks hold in parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torch_flowprune.gradients.flow_source import FlowSource
from torch_flowprune.gradients.sharding import ShardedModel, in_shards
from torch_flowprune.gradients.synflow import SynapticFlow, absolute_state
from torch_flowprune.inputs import Ranks, Target, local, mapped


def synaptic_gradient_in_parts(
    model: nn.Module, targets: Mapping[str, Target], theta: Mapping[str, Tensor], source: FlowSource
) -> dict[str, Tensor]:
    """:func:`~torch_flowprune.gradients.synflow.synaptic_gradient` of all ranks, on the first one's example.

    Each rank holds the absolute values of its parts in float64, and of one unit at a time the whole.
    """
    holders = Ranks.holding(model.parameters())
    with holders.together(), in_shards(model):
        example = source.example(model)
    inputs = holders.agreed_object(mapped(lambda leaf: leaf.to("cpu"), example))
    state = absolute_state(model, {id(target.parameter): theta[name] for name, target in targets.items()})
    sharded = ShardedModel(model, targets, under_masks=False)
    for name, parameter in model.named_parameters():
        sharded.shards[id(parameter)].hold(local(state[name]))
    leaves = [shard.leaf for shard in sharded.targets]
    device = next(iter(targets.values())).parameter.device

    def run(args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        return model(*args, **keywords)

    with _holding(model, state), sharded.installed():
        grads = SynapticFlow(model, leaves, run, sharded.ranks.count).gradient(inputs, device)
    return {
        name: shard.handed_out(torch.zeros_like(shard.leaf) if grad is None else grad)
        for name, shard, grad in zip(targets, sharded.targets, grads, strict=True)
    }


@contextmanager
def _holding(model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the model's buffers are those of a state."""
    owners = [
        (module, key, f"{prefix}.{key}" if prefix else key)
        for prefix, module in model.named_modules()
        for key, value in module._buffers.items()
        if value is not None
    ]
    kept = [module._buffers[key] for module, key, _ in owners]
    try:
        for module, key, name in owners:
            module._buffers[key] = state[name]
        yield
    finally:
        for (module, key, _), value in zip(owners, kept, strict=True):
            module._buffers[key] = value

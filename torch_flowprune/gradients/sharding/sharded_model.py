"""A model that several ranks hold in parts, run as a graph that can be differentiated twice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from torch_flowprune.gradients.sharding.calls import leaves_of
from torch_flowprune.gradients.sharding.data_ranks import DataRanks
from torch_flowprune.gradients.sharding.holders import Holders, Owner
from torch_flowprune.gradients.sharding.settled_gradients import settled_gradients
from torch_flowprune.gradients.sharding.sharded_modules import fully_sharded
from torch_flowprune.gradients.sharding.shards import Layout, Shard
from torch_flowprune.gradients.sharding.units import Unit
from torch_flowprune.inputs import Target, as_shard_of, is_sharded, local, without_cache
from torch_flowprune.torch_internals import (
    ShardedParameter,
    forward_hooks_of_sharding,
    sharded_parameters,
)


class ShardedModel:
    """Its parameters' parts, and the model set up so that gradients are taken of those.

    The hooks of ``fully_shard`` are set aside. Its innermost modules are :class:`Unit` s; what stands outside of them
    is whole while a loss is computed and differentiated (``held``), as ``fully_shard`` has it for the root's own.
    """

    def __init__(self, model: nn.Module, targets: Mapping[str, Target], *, under_masks: bool) -> None:
        self.model, self.modules, self.parameters = model, fully_sharded(model), dict(model.named_parameters())
        kept = {id(one.parameter): one for module in self.modules for one in sharded_parameters(module)}
        self.ranks = DataRanks([one.mesh for one in kept.values()])
        every = [*(target.parameter for target in targets.values()), *model.parameters()]
        self.shards = {id(one): self._shard(one, kept.get(id(one))) for one in every}
        self.targets = [self.shards[id(target.parameter)] for target in targets.values()]
        for target in targets.values():
            if target.mask is not None and is_sharded(target.mask) and not under_masks:
                self.shards[id(target.parameter)].kept = local(as_shard_of(target.mask, target.parameter))
        self.share: float | None = None
        inner = [one for one in self.modules if one is not model and not _fully_sharded_below(one, self.modules)]
        inside = {id(module) for unit in inner for module in unit.modules()}
        self.units = [Unit(module, self._owners(module.modules())) for module in inner]
        self.rest = Holders(self._owners(module for module in model.modules() if id(module) not in inside))
        self._is_held, self._known = False, 0

    def _shard(self, parameter: Any, kept: ShardedParameter | None) -> Shard:
        if kept is None:
            own = Layout(parameter.device_mesh, parameter.placements, parameter) if is_sharded(parameter) else None
            return Shard(parameter, None, own, self.ranks)
        if kept.before is None:
            return Shard(parameter, Layout(parameter.device_mesh, parameter.placements, parameter), None, self.ranks)
        return _cut_twice(parameter, kept, self.ranks)

    def _owners(self, modules: Iterable[nn.Module]) -> list[Owner]:
        return [
            Owner(module, key, self.shards[id(parameter)])
            for module in modules
            for key, parameter in module._parameters.items()
            if parameter is not None
        ]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, the model may be run, and what :meth:`held` has run be differentiated."""
        with ExitStack() as stack:
            for module in self.modules:
                stack.enter_context(_without_sharding(module))
            for unit in self.units:
                stack.enter_context(_with_forward(unit.module, unit.around(unit.module.forward, lambda: self.share)))
            stack.enter_context(_with_forward(self.model, self._holding(self.model.forward)))
            stack.enter_context(settled_gradients())
            yield

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, parameters outside of units are whole, and part of one graph."""
        if self._is_held:
            yield
            return
        self._is_held = True
        try:
            with self.rest.filled(self.rest.gathered(self.share)):
                yield
        finally:
            self._is_held = False

    @contextmanager
    def all_held(self) -> Iterator[None]:
        """Inside, no call of a unit is tried as a step of its own, which may be undone: each is made once."""
        before = [unit.is_held for unit in self.units]
        try:
            for unit in self.units:
                unit.is_held = True
            yield
        finally:
            for unit, was_held in zip(self.units, before, strict=True):
                unit.is_held = was_held

    def holds_more(self) -> bool:
        """Whether a unit had to hold its parameters that did not before, on any rank: then it does on all of them."""
        flags = torch.tensor([float(unit.is_held) for unit in self.units], device="cpu")
        before = self._known
        if before == len(self.units):
            return False
        self.ranks.sum([flags])
        for unit, flag in zip(self.units, flags.tolist(), strict=True):
            unit.is_held = bool(flag)
        self._known = sum(unit.is_held for unit in self.units)
        return self._known > before

    def _holding(self, forward: Any) -> Any:
        """Also for calls of the model by themselves. Its units take no cache of a language model, which they fill."""

        @wraps(forward)
        def held_forward(*args: Any, **kwargs: Any) -> Any:
            with self.held():
                return forward(*args, **{**without_cache(self.model, args), **kwargs})

        return held_forward

    def check_reached(self, loss: Tensor) -> None:
        """An error where the loss reads a shard as it is, by which no derivative would be taken.

        Raises:
            ValueError: naming the parameter.
        """
        read = leaves_of(loss)
        for name, parameter in self.parameters.items():
            if id(parameter) in read:
                raise ValueError(
                    f"the loss reads {name!r} outside of the module under fully_shard that it belongs to, where it is "
                    "a shard: read it in that module's forward, or leave it to the root (fully_shard takes it out of "
                    "the inner module by ignored_params=)"
                )


def _fully_sharded_below(module: nn.Module, modules: Iterable[nn.Module]) -> bool:
    below = {id(one) for one in module.modules()} - {id(module)}
    return any(id(one) in below for one in modules)


def _cut_twice(parameter: Any, kept: ShardedParameter, ranks: DataRanks) -> Shard:
    """By ``fully_shard``, of what tensor parallelism has left on this rank."""
    from torch.distributed import tensor

    inner = Layout(kept.before.mesh, kept.before.placements, kept.before)
    placements = [*[tensor.Replicate()] * (kept.mesh.ndim - 1), tensor.Shard(kept.axis)]
    return Shard(parameter, Layout(kept.mesh, placements, torch.empty(kept.size, device="meta")), inner, ranks)


@contextmanager
def _without_sharding(module: Any) -> Iterator[None]:
    """Inside, the hooks of ``fully_shard`` are off; afterwards they stand where they stood."""
    registries = module._forward_pre_hooks, module._forward_hooks
    kept, numbers = [dict(registry) for registry in registries], forward_hooks_of_sharding(module)
    try:
        for registry in registries:
            for number in numbers & registry.keys():
                del registry[number]
        yield
    finally:
        for registry, before in zip(registries, kept, strict=True):
            registry.clear()
            registry.update(before)


@contextmanager
def _with_forward(module: nn.Module, forward: Any) -> Iterator[None]:
    before = vars(module).get("forward")
    try:
        vars(module)["forward"] = forward
        yield
    finally:
        if before is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = before

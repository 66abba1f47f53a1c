"""How a mask lives on a parameter of which this rank holds a shard: the zeros are in the shard.

``fully_shard`` gathers the shards by itself and finds the parameter by its name, so there is no second name and no
property. The mask is a buffer beside the parameter, a bool ``DTensor`` that lies as it does. Gradients are cleared
under it where they are complete (after the reduce-scatter), and values after every step of an optimizer and every load.
All of that reads the buffer when it runs, so that masks written by a checkpoint are seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from torch_flowprune.inputs import clear, is_sharded, local, mask_of
from torch_flowprune.masking.carrier.hook import MaskHook, drop_hook, pruning_hooks
from torch_flowprune.masking.mask_memory import note_new_mask, remember
from torch_flowprune.torch_internals import tensor_name


class ShardHook(MaskHook):
    """Tells torch's functions "this tensor is pruned", and keeps the zeros of one shard.

    What it registers, on the parameter and on the module, is of that module: a copy registers its own when it runs.
    """

    on_load: RemovableHandle | None = None
    _parameter: nn.Parameter | None = None
    _on_gradient: RemovableHandle | None = None

    def hold(self, module: nn.Module, mask: Tensor) -> None:
        """From now on the shard of this module's parameter has zeros under its mask."""
        super().hold(module, mask)
        _hooks_on_shards.add(self)
        self._follow()

    def _follow(self) -> None:
        """The parameter of the module may be another than at the last look: moved, or no longer frozen."""
        module = self._owner()
        parameter = None if module is None else module._parameters.get(tensor_name(self))
        if parameter is None or not is_sharded(parameter):
            return
        if parameter is not self._parameter:
            self._let_go()
            self._parameter = parameter
        if parameter.requires_grad and self._on_gradient is None:
            self._on_gradient = parameter.register_post_accumulate_grad_hook(self._clear_gradient)

    def _let_go(self) -> None:
        if self._on_gradient is not None:
            self._on_gradient.remove()
        self._parameter = self._on_gradient = None

    def forget(self) -> None:
        """The mask that it came with is put aside: the parameter has no hook of it."""
        self._let_go()
        _hooks_on_shards.discard(self)

    def is_on(self, parameters: set[int]) -> bool:
        """Whether its parameter is one of these, by identity."""
        self._follow()
        return id(self._parameter) in parameters

    def clear_loaded(self, module: nn.Module, _: Any) -> None:
        """After a state was loaded, into a copy of the module too."""
        self.hold(module, module._buffers[mask_of(tensor_name(self))])  # type: ignore[arg-type]
        self.clear()

    def clear(self) -> None:
        """Zeros in the shard, where the mask says so now."""
        mask, parameter = self._mask(), self._parameter
        if mask is None or parameter is None:
            return
        if _journals:
            _journals[-1].append(_undo(local(parameter), local(mask)))
        clear(parameter, mask)

    def _clear_gradient(self, parameter: Tensor) -> None:
        mask = self._mask()
        if mask is None or parameter.grad is None:
            return
        if local(parameter.grad).shape == local(mask).shape:
            clear(parameter.grad, mask)
        else:  # a sum that lies otherwise than what it is of
            parameter.grad = torch.where(mask, parameter.grad, 0)

    def _mask(self) -> Tensor | None:
        module = self._owner()
        return None if module is None else module._buffers.get(mask_of(tensor_name(self)))

    def _owner(self) -> nn.Module | None:
        return None if self._module is None else self._module()

    def __getstate__(self) -> dict[str, Any]:
        return {key: one for key, one in super().__getstate__().items() if key not in ("_parameter", "_on_gradient")}

    def __call__(self, module: nn.Module, *_: Any) -> None:
        """Before the module's forward; only a copy has anything to do."""
        mask = module._buffers.get(mask_of(tensor_name(self)))
        if self._module is None and mask is not None:
            self.hold(module, mask)

    def compute_mask(self, *_: Any, **__: Any) -> Tensor:
        """An error: torch's methods would take the parameter's name away, by which its shards are found."""
        self._put_back()
        raise ValueError(
            f"{tensor_name(self)!r} is a shard, which torch's pruning methods rename: prune it further with "
            "fp.global_prune or fp.apply_masks"
        )

    def apply_mask(self, module: nn.Module) -> Tensor:
        """The parameter, which has its zeros."""
        value: Tensor = module._parameters[tensor_name(self)]  # type: ignore[assignment]
        return value

    def remove(self, module: nn.Module) -> None:
        """Make the mask permanent; torch, which calls this, deletes the hook."""
        self.clear()
        if self._parameter is not None:
            remember(self._parameter, self._mask())
        self.forget()
        if self.on_load is not None:
            self.on_load.remove()
        del module._buffers[mask_of(tensor_name(self))]


def hold_in_shard(module: nn.Module, name: str, mask: Tensor) -> None:
    """Give one module's sharded parameter this mask, in place of the one it has, and zeros under it."""
    hook = shard_hook(module, name)
    module.register_buffer(mask_of(name), mask)
    if hook is None:
        hook = ShardHook(name)
        if _journals:
            _journals[-1].append(hook.forget)
        module.register_forward_pre_hook(hook)
        hook.on_load = module.register_load_state_dict_post_hook(hook.clear_loaded)
    hook.hold(module, mask)
    hook.clear()
    note_new_mask()
    if not _on_every_step:
        _on_every_step.append(register_optimizer_step_post_hook(_clear_values))


def release_shard(module: nn.Module, name: str) -> None:
    """The mask off a shard; its zeros are values from here on."""
    hook = shard_hook(module, name)
    if hook is not None:
        hook.remove(module)
        drop_hook(module, name)


def shard_hook(module: nn.Module, name: str) -> ShardHook | None:
    """The hook that keeps the zeros of this shard; None where no mask is on it, or the parameter is whole."""
    hooks = (one for one in pruning_hooks(module).values() if isinstance(one, ShardHook))
    return next((one for one in hooks if tensor_name(one) == name), None)


@contextmanager
def values_back() -> Iterator[None]:
    """Afterwards the values of shards that masks have cleared inside are what they were."""
    journal: list[Callable[[], object]] = []
    _journals.append(journal)
    try:
        yield
    finally:
        _journals.pop()
        for undo in reversed(journal):
            undo()


@contextmanager
def values_back_on_error() -> Iterator[None]:
    """As :func:`values_back`, where an error comes out of it."""
    with values_back():
        journal = _journals[-1]
        yield
        if len(_journals) > 1:  # those further out may have an error yet
            _journals[-2].extend(journal)
        journal.clear()


def _undo(values: Tensor, mask: Tensor) -> Callable[[], object]:
    gone = (values != 0) & ~mask
    return partial(values.__setitem__, gone, values[gone])


def _clear_values(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """After a step of any optimizer: momentum and weight decay move what has no gradient."""
    moved = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for hook in list(_hooks_on_shards):
        if hook.is_on(moved):
            hook.clear()


_hooks_on_shards: WeakSet[ShardHook] = WeakSet()
_journals: list[list[Callable[[], object]]] = []
_on_every_step: list[RemovableHandle] = []

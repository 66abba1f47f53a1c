"""Keeping what is pruned at zero while an optimizer runs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import Never

from torch_flowprune.inputs import (
    as_shard_of,
    check_keywords,
    clear,
    is_sharded,
    local,
    own_names,
    parameters_of,
    unwrapped,
)
from torch_flowprune.masking.mask_memory import MaskMemory
from torch_flowprune.torch_internals import runs_step_hooks

# Where wrappers hold what they wrap: accelerate, Lightning, apex; timm's Lookahead; ZeroRedundancyOptimizer; fastai.
_INNER = ("optimizer", "_optimizer", "base_optimizer", "_base_optimizer", "optim", "opt")


_STILL, _REST = 2, 99
"""After so many steps in which nothing moved, the steps for which no zeros are written, unless something changes."""

_HELD: WeakKeyDictionary[Any, WeakSet[MaskMemory]] = WeakKeyDictionary()


def held_by(optimizer: Any, model: nn.Module) -> list[MaskMemory]:
    """The masks of a model that this optimizer's steps hold at zero."""
    return [memory for memory in _HELD.get(optimizer, ()) if memory.model is model]


def holders(model: nn.Module) -> set[Any]:
    """The optimizers, and wrappers of them, whose steps hold zeros of a model."""
    return {one for one, memories in _HELD.items() if any(memory.model is model for memory in memories)}


def keep_zeros(
    model: nn.Module, optimizer: Any, masks: Mapping[str, Tensor] | None = None, **unknown: Never
) -> RemovableHandle:
    """Hold pruned entries at exactly 0, in the parameters and in the optimizer's state, now and after every step.

    Without it a masked model computes the same, but momentum and weight decay change the values under the mask, and
    after :func:`~torch_flowprune.remove` training changes the zeros. The latest mask of each parameter holds, whatever
    applied it, also from later rounds and after ``remove``. So you can call it before the first pruning.

    Zeros are written after a step that follows a change of masks, parameters or optimizer states; once two steps have
    changed none of them, after every hundredth step. For parameters whose masks were made permanent, they are written
    after every step.

    Optimizers that read a whole parameter (the norms of LAMB, LARS and Adafactor, adaptive clipping) also read the
    values under the mask. From the first step on, these are zeros.

    Args:
        model: the model, pruned or not.
        optimizer: any optimizer over its parameters, or a wrapper around one, such as accelerate's, Lightning's,
            fastai's or timm's ``Lookahead``.
        masks: further masks to hold, by parameter name, for a model whose masks were made permanent before.
        unknown: no other keyword is accepted; the error names the one meant.

    Returns:
        A handle: ``handle.remove()`` ends it. A copied or loaded optimizer has no hooks, so call this again for it.

    Raises:
        ValueError: if a mask does not fit its parameter.
        TypeError: if the optimizer has no ``step``.

    See Also:
        :func:`~torch_flowprune.sync_masks`: gives masks to averages of the model.
        :func:`~torch_flowprune.regrow`: lets weights come back.

    >>> import torch, torch_flowprune as fp
    >>> layer = torch.nn.Linear(4, 2)
    >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.1)
    >>> handle = fp.keep_zeros(layer, optimizer)
    >>> report = fp.global_prune(layer, "magnitude", sparsity=0.5)
    >>> layer(torch.ones(1, 4)).sum().backward(); optimizer.step()
    >>> int((layer.weight_orig == 0).sum())
    4
    """
    check_keywords(keep_zeros, unknown)
    if not callable(getattr(optimizer, "step", None)):
        raise TypeError(f"expected an optimizer or a wrapper around one, got {type(optimizer).__name__}")
    chain = _chain(optimizer)
    hold = _HoldZeros(MaskMemory(model, _checked_masks(model, masks or {})), chain)
    hold()
    for one in chain:
        _HELD.setdefault(one, WeakSet()).add(hold.memory)
    return _after_each_step(chain, hold)


def _checked_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By the model's own names."""
    known = parameters_of(unwrapped(model))
    names = own_names(known, masks)
    for given, mask in masks.items():
        if names[given] not in known or known[names[given]].parameter.shape != mask.shape:
            raise ValueError(
                f"masks= has {given!r} of shape {tuple(mask.shape)}, and the model has no such parameter of that shape"
            )
    return {names[given]: mask for given, mask in masks.items()}


class _HoldZeros:
    """The hook. A class, as a function inside another could not be pickled."""

    def __init__(self, memory: MaskMemory, optimizers: list[Any]) -> None:
        self.memory, self.optimizers = memory, optimizers
        self._states: list[object] = []
        self._still = self._rested = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return _HoldZeros, (self.memory, self.optimizers)

    def __call__(self, *_: Any) -> None:
        if self._may_rest():
            self._rested += 1
            return
        known = self.memory.look()
        held = {name: mask for name in known if (mask := self.memory.latest.get(name)) is not None}
        moved = [flag for name, mask in held.items() for flag in self._zero(known[name].parameter, mask)]
        # of a parameter that wears its mask the gradient is 0 there: an optimizer that does not move such zeros by
        # itself has nothing to move. Of one whose mask was made permanent it is not, and of a shard it may not be.
        stays = all(known[name].mask is not None and not is_sharded(known[name].parameter) for name in held)
        self._still = self._still + 1 if stays and not _any(moved) else 0
        self._rested, self._states = 0, [getattr(one, "state", None) for one in self.optimizers]

    def _may_rest(self) -> bool:
        """Whether nothing moved in the last steps, and nothing has changed since: masks, parameters, loaded states."""
        return (
            self._still >= _STILL
            and self._rested < _REST
            and all(
                getattr(one, "state", None) is then for one, then in zip(self.optimizers, self._states, strict=True)
            )
            and self.memory.is_up_to_date()
        )

    def _zero(self, parameter: nn.Parameter, mask: Tensor) -> list[Tensor]:
        """Zeros where the mask is false; for each tensor whether there was anything else."""
        held = _laid_as(mask, parameter)
        values = [parameter, *_states_like(mask, parameter, self.optimizers)]
        return [_cleared(local(value), held) for value in values]


def _cleared(value: Tensor, held: Tensor) -> Tensor:
    """Whether clearing changed anything."""
    before = torch.count_nonzero(value)
    clear(value, held)
    return before != torch.count_nonzero(value)


def _any(flags: list[Tensor]) -> bool:
    return bool(flags) and bool(torch.stack([flag.to(flags[0].device) for flag in flags]).any())


def zero_grown(parameter: nn.Parameter, stays: Tensor, optimizers: Iterable[Any]) -> None:
    """Zeros in a parameter, and in what optimizers remember of it, where it has grown: where it does not stay."""
    clear(parameter, stays)
    for state in _states_like(stays, parameter, [one for given in optimizers for one in _chain(given)]):
        clear(state, stays)


def _states_like(mask: Tensor, parameter: nn.Parameter, optimizers: Iterable[Any]) -> Iterator[Tensor]:
    """What optimizers keep of each entry of a parameter."""
    for optimizer in optimizers:
        for key, value in getattr(optimizer, "state", {}).get(parameter, {}).items():
            if key != "step" and _has_numbers_like(mask, value):
                yield value


def _has_numbers_like(mask: Tensor, value: object) -> bool:
    """Whether a state has a number for each entry: codes in 8 bits, say, have a code of their own for 0."""
    return isinstance(value, Tensor) and value.shape == mask.shape and (value.is_floating_point() or value.is_complex())


def _laid_as(mask: Tensor, parameter: Tensor) -> Tensor:
    """A mask's entries for the part of the parameter that is here."""
    return local(as_shard_of(mask, parameter)) if is_sharded(parameter) else mask


def _chain(optimizer: Any) -> list[Any]:
    """An optimizer and what it wraps, outermost first."""
    chain = [optimizer]
    while True:
        inner = [getattr(chain[-1], key, None) for key in _INNER]
        known = {id(one) for one in chain}
        found = next((one for one in inner if callable(getattr(one, "step", None)) and id(one) not in known), None)
        if found is None:
            return chain
        chain.append(found)


def _after_each_step(chain: list[Any], hook: Callable[..., None]) -> RemovableHandle:
    """Run the hook after each step, of the outermost that runs hooks: not all of torch's kind do."""
    outermost = next((one for one in chain if runs_step_hooks(one)), None)
    if outermost is not None:
        handle: RemovableHandle = outermost.register_step_post_hook(hook)
        return handle
    innermost = chain[-1]
    if not isinstance(innermost.step, _StepThenHooks):
        innermost.step = _StepThenHooks(innermost)
    hooks = innermost.step.hooks
    handle = RemovableHandle(hooks)
    hooks[handle.id] = hook
    return handle


class _StepThenHooks:
    """The step of an optimizer that knows no hooks, as fastai's own, and hooks after it."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.hooks: OrderedDict[int, Callable[..., None]] = OrderedDict()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = type(self.optimizer).step(self.optimizer, *args, **kwargs)
        for hook in list(self.hooks.values()):
            hook()
        return result

"""Keeping what is pruned at zero while an optimizer runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from torch_flowprune.inputs import Target, clear, parameters_of, unwrapped
from torch_flowprune.masking.checkpoint import masks_on


@dataclass(eq=False)
class HeldZeros:
    """What runs after an optimizer's steps: pruned entries of a model, and of the optimizer's state, back to 0."""

    model: nn.Module
    masks: Mapping[str, Tensor]

    def __call__(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self.write(parameters_of(self.model), optimizer)

    def write(self, targets: Mapping[str, Target], optimizer: torch.optim.Optimizer) -> None:
        """Once, into these parameters of the model."""
        for name, target in targets.items():
            mask = self.masks.get(name) if target.mask is None else target.mask
            if mask is not None:
                _zero(target, mask, optimizer)


_HELD: WeakKeyDictionary[torch.optim.Optimizer, WeakSet[HeldZeros]] = WeakKeyDictionary()


def held_by(optimizer: torch.optim.Optimizer, model: nn.Module) -> Iterable[HeldZeros]:
    """The zeros of a model that this optimizer's steps hold."""
    return [held for held in _HELD.get(optimizer, ()) if held.model is model]


def keep_zeros(
    model: nn.Module, optimizer: torch.optim.Optimizer, masks: Mapping[str, Tensor] | None = None
) -> RemovableHandle:
    """Hold pruned entries at exactly 0, in the parameters and in the optimizer's state, now and after every step.

    Without it a masked model computes the same, but momentum and weight decay move what lies under the mask; and after
    :func:`~torch_flowprune.remove` training revives zeros. Called before ``remove``, or with ``masks``, it goes on
    holding them afterwards. Masks put on later are held too.

    Args:
        model: the pruned model.
        optimizer: any optimizer over its parameters.
        masks: what to hold, by parameter name; the model's own masks if left out.

    Returns:
        A handle: ``handle.remove()`` ends it.

    Raises:
        ValueError: if nothing is pruned, or a mask does not fit its parameter.

    >>> import torch_flowprune as fp
    >>> layer = nn.Linear(4, 2)
    >>> report = fp.global_prune(layer, "magnitude", sparsity=0.5)
    >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.1)
    >>> handle = keep_zeros(layer, optimizer)
    >>> layer(torch.ones(1, 4)).sum().backward(); optimizer.step()
    >>> int((layer.weight_orig == 0).sum())
    4
    """
    inner = unwrapped(model)
    known = parameters_of(inner)
    held = masks_on(known) if masks is None else dict(masks)
    if not held:
        raise ValueError(
            "nothing is pruned, so there are no zeros to keep: prune first, or after fp.remove pass masks= "
            "(fp.masks(model), taken before)"
        )
    for name, mask in held.items():
        if name not in known or known[name].parameter.shape != mask.shape:
            raise ValueError(
                f"masks= has {name!r} of shape {tuple(mask.shape)}, and the model has no such parameter of that shape"
            )

    zeros = HeldZeros(inner, held)
    zeros.write(known, optimizer)
    _HELD.setdefault(optimizer, WeakSet()).add(zeros)
    return optimizer.register_step_post_hook(zeros)


def _zero(target: Target, mask: Tensor, optimizer: torch.optim.Optimizer) -> None:
    if target.parameter.shape != mask.shape:
        raise ValueError(
            f"keep_zeros holds a mask of shape {tuple(mask.shape)} on {target.name!r}, which has been cut to "
            f"{tuple(target.parameter.shape)} since: shrink(..., optimizer=) takes it along"
        )
    clear(target.parameter, mask)
    for value in optimizer.state.get(target.parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == mask.shape:
            clear(value, mask)

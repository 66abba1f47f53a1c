"""Masks put on a model, all or nothing."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from typing_extensions import Never

from torch_flowprune.inputs import (
    Ranks,
    Target,
    alike,
    as_shard_of,
    check_keywords,
    flags,
    forget_caches,
    is_sharded,
    lasting,
    local,
    parameters_of,
    unwrapped,
)
from torch_flowprune.masking.carrier import hold_in_shard, put_on, release_shard, take_off
from torch_flowprune.masking.checks import all_fitting, check_on_all_ranks
from torch_flowprune.masking.mask_memory import remember
from torch_flowprune.masking.pretrained_files import guard_saving
from torch_flowprune.masking.snapshots import all_or_nothing


def apply_masks(
    model: nn.Module, masks: Mapping[str, Tensor], *, replace: bool = False, copy: bool = True, **unknown: Never
) -> None:
    """Apply masks to a model, by parameter name: bool (True = kept), or packed as by ``fp.masks(packed=True)``.

    A parameter that is already pruned keeps only what both masks keep. With ``replace=True`` the new masks replace the
    old ones, and weights that only the new masks keep come back with their old values. All or nothing: everything is
    checked first, and an error undoes the changes.

    Args:
        model: any module; masked in place.
        masks: by parameter name, each in the parameter's shape.
        replace: whether these masks replace the existing ones.
        copy: with False, the model keeps these mask tensors without copying them, where they fit.
        unknown: no other keyword is accepted; the error names the one meant.

    Of a sharded model every rank makes the same call, with whole masks or with shards of them; an error on one leaves
    all as they were. There the values under a mask are gone, and what comes back is zero.

    Raises:
        ValueError: for an unknown name, a mask of another shape or dtype, or a parameter that cannot carry a mask.
        TypeError: for a mask that is not a tensor.

    See Also:
        :func:`~torch_flowprune.masks`: the masks of a model.
        :func:`~torch_flowprune.remove`: makes masks permanent.

    >>> import torch, torch_flowprune as fp
    >>> layer = torch.nn.Linear(2, 2)
    >>> fp.apply_masks(layer, {"weight": torch.tensor([[True, False], [True, True]])})
    >>> int((layer.weight == 0).sum())
    1
    >>> fp.apply_masks(layer, {"weight": torch.tensor([[True, True], [False, False]])}, replace=True)
    >>> int((layer.weight == 0).sum())
    2
    """
    check_keywords(apply_masks, unknown)
    known = parameters_of(unwrapped(model))
    check_on_all_ranks(known, masks)
    checked = all_fitting(known, masks)
    ranks = Ranks.holding(target.parameter for target in known.values())
    with all_or_nothing(known[name] for name in checked):
        with ranks.together():
            for name, mask in checked.items():
                _add_mask(known[name], mask, replace=replace, copy=copy)
        if checked:
            forget_caches(model)
    if checked:
        guard_saving(model)


def put_masks(model: nn.Module, targets: Mapping[str, Target], masks: Mapping[str, Tensor]) -> None:
    """As :func:`apply_masks`, of masks that fit these targets and are given away.

    Nothing is checked, and an error takes nothing back: for inside :func:`~torch_flowprune.masking.all_or_nothing`.
    """
    for name, mask in masks.items():
        _add_mask(targets[name], mask, replace=False, copy=False)
    if masks:
        forget_caches(model)
        guard_saving(model)


def _add_mask(target: Target, mask: Tensor, *, replace: bool, copy: bool) -> None:
    old = None if replace else target.mask
    if old is not None:
        mask = alike(local(as_shard_of(mask, target.parameter)) & local(flags(old)), target.parameter)
    set_mask(target, mask, copy=copy and old is None)


def set_mask(target: Target, mask: Tensor | None, copy: bool = True) -> None:
    """Exactly this mask (none: no mask, the parameter as it is) for every owner of the parameter.

    Tied owners share one tensor. Of a shard the values under the mask are zeros from here on.
    """
    if is_sharded(target.parameter):
        _set_on_shard(target, mask, copy=copy)
        return
    own = mask
    if mask is not None and (copy or not _laid_alike(mask, target.parameter)):
        own = lasting(torch.empty_like(target.parameter.detach(), dtype=torch.bool).copy_(mask))
    for module, attribute in target.owners:
        if own is not None:
            put_on(module, attribute, own)
        elif target.mask is not None:
            take_off(module, attribute)


def _set_on_shard(target: Target, mask: Tensor | None, *, copy: bool) -> None:
    own = None if mask is None else as_shard_of(mask, target.parameter)
    if own is not None and (own is mask) and copy:
        own = alike(lasting(local(own).clone()), target.parameter)
    for module, attribute in target.owners:
        if own is not None:
            hold_in_shard(module, attribute, own)
        elif target.mask is not None:
            release_shard(module, attribute)
            remember(target.parameter, None)


def _laid_alike(mask: Tensor, parameter: nn.Parameter) -> bool:
    """Whether the mask can live beside the parameter as it is.

    In the same order, with no other tensor in its memory, and no tensor of inference mode.
    """
    alone = mask.untyped_storage().nbytes() == mask.nbytes
    return mask.stride() == parameter.stride() and alone and not mask.is_inference()

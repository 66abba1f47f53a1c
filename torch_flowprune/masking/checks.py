"""Which parameters can carry a mask, and which masks fit them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torch_flowprune.inputs import (
    Ranks,
    Target,
    alike,
    as_shard_of,
    box_of,
    check_shapes,
    computed,
    is_sharded,
    local,
    mask_of,
    original,
    own_names,
)
from torch_flowprune.masking.carrier import shard_hook, standardises
from torch_flowprune.masking.packed_bits import unpack


def check_can_mask(target: Target | None, name: str, *, shards: bool = False, factors: bool = True) -> Target:
    """The target itself, or a ``ValueError`` that says why it cannot carry a mask, and what to do.

    Whoever goes on with parts of parameters says so by ``shards``. Whoever takes zeros of parameters for zeros of
    weights takes no ``factors``, from which a layer computes its weight.
    """
    if target is None:
        raise ValueError(f"this model has no parameter {name!r}")
    check_shapes([target])
    if target.parameter.is_meta:
        raise ValueError(f"{name!r} is on the meta device and has no values: load or initialise the model first")
    if target.parameter.layout is not torch.strided:
        raise ValueError(f"{name!r} is a sparse tensor ({target.parameter.layout}): make it dense first (.to_dense())")
    if is_sharded(target.parameter):
        _check_shard(target, name, taken=shards)
    for module, attribute in target.owners:
        _check_owner(module, attribute, name, factors=factors)
    return target


def _check_shard(target: Target, name: str, *, taken: bool) -> None:
    """A mask lies as its shard does, beside it and under its name."""
    if not taken:
        raise ValueError(
            f"{name!r} is a sharded DTensor, and this takes whole parameters: fp.global_prune, fp.Pruner, fp.scores, "
            "fp.compare and fp.apply_masks take sharded models; for other calls load the full state dict into a model "
            "that is not sharded"
        )
    box_of(target.parameter)
    kinds = [type(module) for module, attribute in target.owners if attribute == "weight"]
    if any(standardises(kind) for kind in kinds):
        raise ValueError(
            f"{name!r} is a shard, and its layer standardises it before use: zeros in the shard would not be zeros in "
            "the kernel; leave it out with exclude=, or prune before the model is sharded"
        )
    if target.mask is not None and not is_sharded(target.mask):
        raise ValueError(
            f"{name!r} was pruned before it was sharded, so each rank holds its whole mask: for further rounds shard "
            "first, load the weights, and apply the masks with fp.apply_masks"
        )


def _check_owner(module: nn.Module, attribute: str, name: str, *, factors: bool) -> None:
    if isinstance(module, parametrize.ParametrizationList) and not factors:
        raise ValueError(
            f"{name!r} is the original of a parametrization: a mask on it would not be one on the weight; "
            "parametrize.remove_parametrizations first"
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError(
            f"{name!r} belongs to a scripted module, whose code is fixed: prune the model before scripting it"
        )
    if (reason := computed(module, attribute)) and not factors:
        raise ValueError(f"{name!r} is {reason}")
    sharded = is_sharded(module._parameters.get(attribute))
    if attribute in module._parameters and not (sharded and shard_hook(module, attribute) is not None):
        for key in (original(attribute), mask_of(attribute)):
            _check_free(module, key)
    mask = module._buffers.get(mask_of(attribute))
    if mask is None or sharded:
        _check_plain(module, attribute, name)
        return
    if mask.dtype is not torch.bool and not ((mask == 0) | (mask == 1)).all():
        raise ValueError(
            f"the mask torch has put on {name!r} holds other values than 0 and 1, so it scales weights: prune.remove "
            "it first"
        )


def _check_plain(module: nn.Module, attribute: str, name: str) -> None:
    """A mask takes the place of the parameter where it is read: it has to be what is read there."""
    if getattr(module, attribute, None) is not module._parameters[attribute]:
        raise ValueError(
            f"{name!r} is not what {type(module).__name__} gives when it is asked for {attribute!r} (its own "
            "__getattr__?), so a mask would have no effect: make it an ordinary parameter first, or pass exclude="
        )


def _check_free(module: nn.Module, key: str) -> None:
    """An error where a tensor that nothing has pruned leaves no place for its original and its mask."""
    registries: dict[str, dict[str, Any]] = {
        "a buffer": module._buffers,
        "a parameter": module._parameters,
        "a module": module._modules,
        "an attribute": module.__dict__,
    }
    found = next((kind for kind, known in registries.items() if key in known), None)
    if found or hasattr(type(module), key):
        kind = found or "an attribute"
        raise ValueError(
            f"{type(module).__name__} already has {kind} {key!r} of its own, the name a mask needs: rename it"
        )


def _as_bool(target: Target | None, name: str, mask: Tensor) -> tuple[Target, Tensor]:
    """The parameter, and the mask as bool, of its shape.

    An error says why it cannot be put on the parameter.
    """
    target = check_can_mask(target, name, shards=True)
    shape = target.parameter.shape
    if not isinstance(mask, Tensor):
        raise TypeError(
            f"the mask of {name!r} should be a bool tensor (True = kept), got {type(mask).__name__}: torch.tensor(mask)"
        )
    if mask.dtype is torch.uint8 and (mask.shape != shape or shape == (1,)):  # one entry and its byte have one shape
        mask = unpack(mask, shape)
    if mask.dtype is not torch.bool:
        raise ValueError(f"the mask of {target.name!r} should be bool (True = kept), got {mask.dtype}: use mask != 0")
    if mask.shape != target.parameter.shape:
        raise ValueError(
            f"the mask of {target.name!r} should have shape {tuple(target.parameter.shape)}, got {tuple(mask.shape)}"
        )
    return target, mask.detach()


def _fitting(target: Target | None, name: str, mask: Tensor) -> Tensor:
    """The mask as bool, on the parameter's device, and laid on the ranks as the parameter is."""
    target, mask = _as_bool(target, name, mask)
    return as_shard_of(mask.to(target.parameter.device), target.parameter)


def _kept_by_both(one: Tensor, other: Tensor) -> Tensor:
    return alike(local(one) & local(other), one)


def all_fitting(known: Mapping[str, Target], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks under the names that the model has, each as :func:`_fitting` gives it.

    Two masks under two names of one tied weight are one: what either removes is removed.
    """
    names, checked = own_names(known, masks), dict[str, Tensor]()
    for given, mask in masks.items():
        name = names[given]
        found = _fitting(known.get(name), given, mask)
        checked[name] = _kept_by_both(found, checked[name]) if name in checked else found
    return checked


def check_on_all_ranks(known: Mapping[str, Target], masks: Mapping[str, Tensor]) -> None:
    """Before parts of masks are sent: each rank's fit, and are of the same parameters in the same order.

    Raises:
        ValueError, TypeError, RuntimeError: on all ranks, where one has an error.
    """
    ranks = Ranks.holding(target.parameter for target in known.values())
    if ranks.alone:
        return
    with ranks.together():
        names = own_names(known, masks)
        for given, mask in masks.items():
            _as_bool(known.get(names[given]), given, mask)
    own = crc32("\n".join(names.values()).encode())
    first = int(ranks.agreed(torch.tensor(own, device="cpu")))
    with ranks.together():
        if first != own:
            raise ValueError(
                f"this rank gives masks of {', '.join(names.values()) or 'nothing'}, and the first rank of other "
                "parameters, or in another order: every rank gives masks of the same ones"
            )

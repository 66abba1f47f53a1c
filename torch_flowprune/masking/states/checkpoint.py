"""Weights and masks in and out of a model: pruned to pruned, pruned to dense, dense to pruned, and masks alone."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Never

from torch_flowprune.inputs import (
    Target,
    alike,
    as_shard_of,
    check_keywords,
    forget_caches,
    forms,
    is_mask,
    is_sharded,
    local,
    masked_name,
    own_names,
    parameters_of,
    plain_name,
    unwrapped,
    whole,
    without_wrappers,
)
from torch_flowprune.masking.apply import set_mask
from torch_flowprune.masking.carrier import values_intact_on_error
from torch_flowprune.masking.checks import check_can_mask
from torch_flowprune.masking.packed_bits import pack, unpack
from torch_flowprune.masking.pretrained_files import guard_saving, with_zeros
from torch_flowprune.masking.snapshots import intact_on_error


def masks(model: nn.Module, packed: bool = False, **unknown: Never) -> dict[str, Tensor]:
    """The masks of a pruned model by parameter name, True = kept; a parameter that is not pruned has none.

    :func:`~torch_flowprune.apply_masks` applies them to another model.

    Args:
        model: any module.
        packed: eight entries to a byte (uint8), for storing. The masks of a sharded model are shards; packed masks are
            gathered on every rank.
        unknown: no other keyword is accepted; the error names the one meant.

    See Also:
        :func:`~torch_flowprune.report`: how sparse each layer is.

    >>> import torch, torch_flowprune as fp
    >>> layer = torch.nn.Linear(2, 2)
    >>> fp.apply_masks(layer, {"weight": torch.tensor([[True, False], [True, True]])})
    >>> fp.masks(layer)["weight"].tolist(), fp.masks(layer, packed=True)["weight"].tolist()
    ([[True, False], [True, True]], [13])
    """
    check_keywords(masks, unknown)
    known = parameters_of(unwrapped(model))
    if not packed:
        return masks_on(known)
    return {name: pack(whole(target.mask)) for name, target in known.items() if target.mask is not None}


def masks_on(targets: Mapping[str, Target]) -> dict[str, Tensor]:
    """The masks that these parameters have, as bool: copies, which later pruning leaves as they are."""
    found = {name: target.mask for name, target in targets.items() if target.mask is not None}
    return {name: alike(local(mask) != 0, mask) for name, mask in found.items()}


def state_dict(model: nn.Module, *, dense: bool = False, **unknown: Never) -> dict[str, Any]:
    """The model's state dict with masks packed to bits: a mask takes 1/32 of the memory of its float32 weight.

    :func:`load_state_dict` loads it into a pruned or a dense model; ``torch.save`` and safetensors can write it. For a
    sharded model it is ``model.state_dict()``: shards, with their masks as bool.

    Args:
        model: any module.
        dense: return the names of the unpruned model and zeros in the values, without masks, as strict loaders need it
            (``from_pretrained``, a hub, a trainer that resumes). Store :func:`masks` beside it, and apply them with
            :func:`~torch_flowprune.apply_masks`. The values under the masks are not included.
        unknown: no other keyword is accepted; the error names the one meant.

    See Also:
        :func:`~torch_flowprune.load_state_dict`: loads it.
        :func:`~torch_flowprune.save_pruned`: writes a file.

    >>> import torch, torch_flowprune as fp
    >>> layer = torch.nn.Linear(16, 2)
    >>> report = fp.global_prune(layer, "magnitude", sparsity=0.5)
    >>> {name: (str(value.dtype), value.numel()) for name, value in fp.state_dict(layer).items()}
    {'weight_orig': ('torch.float32', 32), 'bias': ('torch.float32', 2), 'weight_mask': ('torch.uint8', 4)}
    >>> torch.nn.Linear(16, 2).load_state_dict(fp.state_dict(layer, dense=True))
    <All keys matched successfully>
    """
    check_keywords(state_dict, unknown)
    inner = unwrapped(model)
    state = inner.state_dict()
    if dense:
        values = with_zeros(state)
    else:
        masks_in_state = {name for name, one in state.items() if is_mask(name, state) and not is_sharded(one)}
        values = {name: pack(value) if name in masks_in_state else value for name, value in state.items()}
    return _with_metadata(values, getattr(state, "_metadata", None))


def _with_metadata(values: Mapping[str, Any], metadata: Mapping[str, Any] | None) -> OrderedDict[str, Any]:
    """As torch's state dicts carry them: the versions of the modules, by which their loaders go."""
    state = OrderedDict(values)
    if metadata is not None:
        state._metadata = metadata  # type: ignore[attr-defined]
    return state


def load_state_dict(
    model: nn.Module, state: Mapping[str, Any], *, lift_masks: bool = False, strict: bool = True, **unknown: Never
) -> nn.Module:
    """Load a state dict of any kind into a model of any kind, all of it or nothing.

    A pruned state (this package's with packed masks, or torch's with ``weight_mask`` of any dtype) gives the model
    exactly its masks, whatever masks the model had before. A dense state sets the weights and keeps the model's masks;
    use this to rewind a pruned model to its initialisation. With ``lift_masks=True`` it removes the masks, so the model
    is dense afterwards. A state that was saved inside ``torch.compile`` or data parallelism loads outside of it, and
    the other way round. A tied weight may be in it under any of its names.

    With ``strict=False``, what fits is loaded, weights with their masks, for example a pruned backbone under a head of
    another size. What the state lacks, or has in another shape, stays unchanged in the model, including its masks. A
    warning names everything that is left out.

    Args:
        model: pruned or dense; loaded in place.
        state: from :func:`~torch_flowprune.state_dict`, or from torch's ``state_dict()`` of a pruned or a dense model.
        lift_masks: with a dense state, remove the model's masks.
        strict: with False, load what fits.
        unknown: no other keyword is accepted; the error names the one meant.

    Returns:
        The model.

    Raises:
        TypeError: for an unknown keyword; the message names the one meant.
        ValueError: if an entry is missing, unexpected or of another shape, or if nothing fits with ``strict=False``;
            nothing is loaded then.
        Exception: any error that a module's own loader raises; nothing is loaded then either.

    Warns:
        UserWarning: names what was left out, with ``strict=False``.

    See Also:
        :func:`~torch_flowprune.state_dict`: a state dict with packed masks.
        :func:`~torch_flowprune.load_pruned`: loads a file.

    >>> import torch, torch_flowprune as fp
    >>> pruned, dense = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)
    >>> report = fp.global_prune(pruned, "magnitude", sparsity=0.5)
    >>> bool((fp.load_state_dict(dense, fp.state_dict(pruned)).weight == pruned.weight).all())
    True
    """
    check_keywords(load_state_dict, unknown)
    inner = unwrapped(model)
    known, own = parameters_of(inner), inner.state_dict()
    expected = {plain_name(key, own): value for key, value in own.items() if not is_mask(key, own)}
    values, masks_in_state = _split(state, expected)
    _fill_tied(values, known, expected)
    faults = _faults(expected, values)
    _check_entries(faults, strict=strict, some_fit=len(faults.not_loaded) < len(expected))
    values = {name: value for name, value in values.items() if name not in faults.not_loaded}
    wanted = _wanted(known, {name: mask for name, mask in masks_in_state.items() if strict or name in values})
    with values_intact_on_error(inner), intact_on_error(inner.modules()):
        if masks_in_state or lift_masks:
            for name, target in known.items():
                if not faults.not_loaded.issuperset(target.names):
                    set_mask(target, wanted.get(name))
            guard_saving(inner)
        own = inner.state_dict()
        loaded = {key: own[key] if is_mask(key, own) else values.get(plain_name(key, own), own[key]) for key in own}
        loaded = {key: _lying_as(one, own[key]) for key, one in loaded.items()}
        inner.load_state_dict(_with_metadata(loaded, _metadata(state, own)))
        forget_caches(inner)
    return model


def _split(state: Mapping[str, Any], expected: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A state dict as values under the model's names, unpruned, and masks under the names of what they mask."""
    own = {without_wrappers(name): name for name in expected}
    values: dict[str, Any] = {}
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        mask = is_mask(key, state) or (key not in expected and _is_of_a_shard(key, state))
        name = masked_name(key) if mask else plain_name(key, state)
        (found if mask else values)[next((own[form] for form in forms(name) if form in own), name)] = value
    return values, found


def _is_of_a_shard(key: str, state: Mapping[str, Any]) -> bool:
    """Whether this is the mask of what was a shard, of which the parameter keeps its name, in a state put together."""
    mask, value = state[key], state.get(masked_name(key))
    if mask is value or not isinstance(mask, Tensor) or not isinstance(value, Tensor):
        return False
    return mask.dtype is torch.bool and value.shape == mask.shape


def _lying_as(value: Any, own: Any) -> Any:
    """As it is, where not one of the two alone is a shard: those torch does not copy."""
    return as_shard_of(value, own) if isinstance(value, Tensor) and is_sharded(value) != is_sharded(own) else value


def _fill_tied(values: dict[str, Any], known: Mapping[str, Target], expected: Mapping[str, Any]) -> None:
    """A tied weight under the names that the state lacks: some writers store one tensor once."""
    for target in known.values():
        given = [values[name] for name in target.names if name in values]
        for name in target.names:
            if given and name in expected:
                values.setdefault(name, given[0])


def wanted_masks(known: Mapping[str, Target], state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The masks that a state has, by the model's names for what they mask."""
    return _wanted(known, {masked_name(key): value for key, value in state.items() if is_mask(key, state)})


def _wanted(known: Mapping[str, Target], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks of a state by the model's names; of two of one tied weight, what either removes."""
    wanted: dict[str, Tensor] = {}
    for key, name in own_names(known, given).items():
        if name in known:
            mask = _mask(given[key], check_can_mask(known[name], name, shards=True).parameter)
            wanted[name] = alike(local(mask) & local(wanted[name]), mask) if name in wanted else mask
    return wanted


def _mask(value: Tensor, parameter: Tensor) -> Tensor:
    if value.shape != parameter.shape:
        value = unpack(value, parameter.shape)
    return as_shard_of(alike(local(value) != 0, value).to(parameter.device), parameter)


def _metadata(state: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The versions that a state says its modules had.

    One that says nothing (safetensors) is of these modules', as all of its entries fit.
    """
    versions = {forms(path)[-1]: version for path, version in getattr(state, "_metadata", {}).items()}
    ours: Mapping[str, Any] = getattr(own, "_metadata", {})
    return {path: versions.get(forms(path)[-1], version) for path, version in ours.items()}


@dataclass(frozen=True)
class _Faults:
    """Where a state does not fit: names that it lacks, has besides, or has in another shape."""

    missing: list[str]
    unexpected: list[str]
    shapes: dict[str, str]

    @property
    def not_loaded(self) -> set[str]:
        return {*self.missing, *self.unexpected, *self.shapes}

    def __str__(self) -> str:
        told = {"missing": self.missing, "unexpected": self.unexpected, "other shape": list(self.shapes.values())}
        return "; ".join(
            f"{kind} {', '.join(names[:5])}" + (" ..." if len(names) > 5 else "")
            for kind, names in told.items()
            if names
        )


def _faults(own: Mapping[str, Any], values: Mapping[str, Any]) -> _Faults:
    return _Faults(
        sorted(own.keys() - values.keys()),
        sorted(values.keys() - own.keys()),
        {
            name: f"{name}: {_shape(values[name])} for {_shape(own[name])}"
            for name in own.keys() & values.keys()
            if isinstance(own[name], Tensor) and _shape(own[name]) != _shape(values[name])
        },
    )


def _check_entries(faults: _Faults, *, strict: bool, some_fit: bool) -> None:
    if str(faults) and strict:
        raise ValueError(f"the state dict does not fit the model, and nothing was loaded: {faults}")
    if not some_fit:
        raise ValueError(f"nothing of the state dict fits the model, and nothing was loaded: {faults}")
    if str(faults):
        warnings.warn(f"what fits of the state dict was loaded; left out: {faults}", UserWarning, stacklevel=3)


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__

"""Weights and masks in and out of a model: pruned to pruned, pruned to dense, dense to pruned, and masks alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from torch_flowprune.inputs import Target, is_mask, masked_name, parameters_of, plain_name, unwrapped
from torch_flowprune.masking.apply import set_mask
from torch_flowprune.masking.checks import check_can_mask
from torch_flowprune.masking.packed_bits import pack, unpack
from torch_flowprune.masking.snapshots import all_or_nothing


def masks(model: nn.Module, packed: bool = False) -> dict[str, Tensor]:
    """The masks of a pruned model by parameter name, True = kept; a parameter that is not pruned has none.

    :func:`~torch_flowprune.apply_masks` puts them on another model.

    Args:
        model: any module.
        packed: eight entries to a byte (uint8), for storing.

    >>> import torch, torch_flowprune as fp
    >>> layer = nn.Linear(2, 2)
    >>> fp.apply_masks(layer, {"weight": torch.tensor([[True, False], [True, True]])})
    >>> masks(layer)["weight"].tolist(), masks(layer, packed=True)["weight"].tolist()
    ([[True, False], [True, True]], [13])
    """
    known = parameters_of(unwrapped(model))
    if not packed:
        return masks_on(known)
    return {name: pack(target.mask) for name, target in known.items() if target.mask is not None}


def masks_on(targets: Mapping[str, Target]) -> dict[str, Tensor]:
    """The masks that these parameters have, as bool: copies, which later pruning leaves as they are."""
    return {name: target.mask != 0 for name, target in targets.items() if target.mask is not None}


def state_dict(model: nn.Module) -> dict[str, Any]:
    """The model's state dict with its masks packed to bits: a mask takes 1/32 of its float32 weight.

    :func:`load_state_dict` reads it back into a pruned or a dense model; ``torch.save`` and safetensors both write it.

    >>> import torch_flowprune as fp
    >>> layer = nn.Linear(16, 2)
    >>> report = fp.global_prune(layer, "magnitude", sparsity=0.5)
    >>> {name: (str(value.dtype), value.numel()) for name, value in state_dict(layer).items()}
    {'weight_orig': ('torch.float32', 32), 'bias': ('torch.float32', 2), 'weight_mask': ('torch.uint8', 4)}
    """
    state = unwrapped(model).state_dict()
    return {name: pack(value) if is_mask(name, state) else value for name, value in state.items()}


def load_state_dict(model: nn.Module, state: Mapping[str, Any]) -> nn.Module:
    """Load a state dict of any kind into a model of any kind, all of it or nothing.

    A pruned state (this package's with packed masks, or torch's with ``weight_mask`` of any dtype) makes the model
    pruned in just that way, whatever it was before. A dense state sets the weights and leaves the model's masks where
    they are: the way to rewind a pruned model to its initialisation.

    Returns:
        The model.

    Raises:
        ValueError: if an entry is missing, unexpected or of another shape; nothing was loaded then.

    >>> import torch_flowprune as fp
    >>> pruned, dense = nn.Linear(4, 2), nn.Linear(4, 2)
    >>> report = fp.global_prune(pruned, "magnitude", sparsity=0.5)
    >>> bool((load_state_dict(dense, state_dict(pruned)).weight == pruned.weight).all())
    True
    """
    inner = unwrapped(model)
    values, masks_in_state = _split(state)
    _check_entries(_split(inner.state_dict())[0], values)
    known = parameters_of(inner)
    wanted = {name: _mask(masks_in_state[name], known[name].parameter) for name in known if name in masks_in_state}
    for name in wanted:
        check_can_mask(known[name], name)
    with all_or_nothing(known.values()):
        if masks_in_state:
            for name, target in known.items():
                set_mask(target, wanted.get(name))
        own = inner.state_dict()
        inner.load_state_dict({key: own[key] if is_mask(key, own) else values[plain_name(key, own)] for key in own})
    return model


def _split(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A state dict as values under dense names, and masks under the names of what they mask."""
    values = {plain_name(name, state): value for name, value in state.items() if not is_mask(name, state)}
    return values, {masked_name(name): value for name, value in state.items() if is_mask(name, state)}


def _mask(value: Tensor, parameter: Tensor) -> Tensor:
    whole = value.shape == parameter.shape
    return ((value != 0) if whole else unpack(value, parameter.shape)).to(parameter.device)


def _check_entries(own: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    missing, unexpected = sorted(own.keys() - values.keys()), sorted(values.keys() - own.keys())
    shapes = [
        f"{name}: {tuple(values[name].shape)} for {tuple(own[name].shape)}"
        for name in own.keys() & values.keys()
        if isinstance(own[name], Tensor) and own[name].shape != values[name].shape
    ]
    faults = [f"{kind} {', '.join(names[:5])}" + (" ..." if len(names) > 5 else "") for kind, names in
              (("missing", missing), ("unexpected", unexpected), ("other shape", shapes)) if names]  # fmt: skip
    if faults:
        raise ValueError(f"the state dict does not fit the model, and nothing was loaded: {'; '.join(faults)}")

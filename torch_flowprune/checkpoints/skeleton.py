"""A checkpoint as a model without values, so that what picks parameters of models picks tensors of files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from torch_flowprune.checkpoints.shards import FLOATS, StoredTensor
from torch_flowprune.inputs import plain_name

_TABLES = re.compile(r"embed|norm|(^|[._])(wte|wpe|ln|ln_\w+|bn\d*|shared)([._]|$)")
_QUANTISED = re.compile(r"weight$|weight_packed$|blocks$")


def skeleton(tensors: Mapping[str, StoredTensor]) -> nn.Module:
    """A tree of modules with these parameters, in this order, each of one element that is repeated.

    Weights of two or more dimensions are those of layers; what is called an embedding or a norm is none, and neither is
    what has one dimension.
    """
    root = nn.Module()
    for name, one in tensors.items():
        if one.kind in FLOATS:
            path, _, attribute = name.rpartition(".")
            owner = _module_at(root, path, _owner_kind(name, one))
            value = torch.zeros((), dtype=one.dtype).expand(one.shape)
            owner.register_parameter(attribute, nn.Parameter(value, requires_grad=False))
    return root


def _owner_kind(name: str, one: StoredTensor) -> type[nn.Module]:
    if _TABLES.search(name.lower()):
        return nn.Embedding
    return nn.Linear if len(one.shape) > 1 else nn.Module


def _module_at(root: nn.Module, path: str, kind: type[nn.Module]) -> nn.Module:
    """The module at a path, made where it is not; one that holds a layer's weight is of that kind."""
    module = root
    for part in path.split(".") if path else ():
        if part not in module._modules:
            module._modules[part] = nn.Module()
        module = module._modules[part]  # type: ignore[assignment]  # none of them is None
    if type(module) is nn.Module and kind is not nn.Module:
        module.__class__ = kind
    return module


def check_dense(tensors: Iterable[StoredTensor]) -> None:
    """An error where weights are stored in a form that hides their magnitudes, or with masks beside them."""
    held = {one.name: one for one in tensors}
    for name, one in held.items():
        if plain_name(name, held) != name:
            raise ValueError(f"{name!r} has a mask beside it: fp.remove the masks before the model is saved")
        if one.kind not in FLOATS and len(one.shape) > 1 and _QUANTISED.search(name):
            raise ValueError(
                f"{name!r} is stored as {one.kind}, quantised: prune the checkpoint that it was made from, and "
                "quantise that"
            )

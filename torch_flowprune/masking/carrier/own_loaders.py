"""Modules that load a state by themselves, and may raise in the middle of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from torch_flowprune.masking.carrier.parametrization import masked_kind
from torch_flowprune.torch_internals import has_loading_hooks

_TRUSTED = ("torch", "torch_flowprune")


@contextmanager
def values_intact_on_error(model: nn.Module) -> Iterator[None]:
    """An error inside leaves the values of the model's state as they were.

    For a state whose shapes all fit: then only modules that load by themselves can raise. Where there are none, nothing
    is copied.
    """
    if not any(_loads_by_itself(module) for module in model.modules()):
        yield
        return
    tensors = [value for value in model.state_dict().values() if isinstance(value, Tensor)]
    copies = [value.clone() for value in tensors]
    extras = [(module, copy.deepcopy(module.get_extra_state())) for module in model.modules() if _has_extra(module)]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for value, kept in zip(tensors, copies, strict=True):
                value.copy_(kept)
        for module, extra in extras:
            module.set_extra_state(extra)
        raise


def _loads_by_itself(module: nn.Module) -> bool:
    """Whether code that is neither torch's nor ours runs when the module is loaded."""
    dense, _ = masked_kind(type(module))
    loader = dense._load_from_state_dict.__module__.partition(".")[0]
    return loader not in _TRUSTED or _has_extra(module) or has_loading_hooks(module)


def _has_extra(module: nn.Module) -> bool:
    return type(module).set_extra_state is not nn.Module.set_extra_state

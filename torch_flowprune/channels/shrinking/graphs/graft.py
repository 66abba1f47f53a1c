"""A module in another's place."""

from __future__ import annotations

from torch import nn


def graft(model: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """``model`` with another module at a path; the module itself where the path is empty."""
    if not path:
        return module
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
    return model

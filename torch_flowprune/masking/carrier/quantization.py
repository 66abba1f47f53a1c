"""A masked layer that is prepared for quantisation says that it will stay in float."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn


def _get(module: nn.Module) -> Any:
    if "qconfig" not in module.__dict__:
        raise AttributeError  # whereupon Python asks the module's own __getattr__
    return module.__dict__["qconfig"]


def _set(module: nn.Module, value: object) -> None:
    warnings.warn(
        "a masked model is prepared for quantisation, which matches exact classes and leaves masked layers in float, "
        "or breaks: quantise fp.export_ready(model), a copy with the masks made permanent",
        UserWarning,
        stacklevel=4,
    )
    module.__dict__["qconfig"] = value


def _delete(module: nn.Module) -> None:
    module.__dict__.pop("qconfig", None)


# What torch's quantisation puts on every module of a model, eager, dynamic or by graphs.
qconfig = property(_get, _set, _delete)

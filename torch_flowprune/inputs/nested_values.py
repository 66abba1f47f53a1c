"""What values hold: those that torch's trees know, and objects that hold others by name."""

from __future__ import annotations

from dataclasses import is_dataclass
from types import SimpleNamespace
from typing import Any

from torch.distributions import Distribution

from torch_flowprune.torch_internals import tree_leaves as registered_leaves


def tree_leaves(value: Any) -> list[Any]:
    """The values that others hold, in order; of a dataclass, a namespace and a distribution the attributes too."""
    leaves: list[Any] = []
    for leaf in registered_leaves(value):
        leaves += tree_leaves(dict(vars(leaf))) if _holds_by_name(leaf) else [leaf]
    return leaves


def _holds_by_name(value: object) -> bool:
    if isinstance(value, (SimpleNamespace, Distribution)):
        return True
    return is_dataclass(value) and not isinstance(value, type)

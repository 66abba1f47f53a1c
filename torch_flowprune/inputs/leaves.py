"""The values that others hold, whatever holds them: outputs of a model above all."""

from __future__ import annotations

from dataclasses import is_dataclass
from types import SimpleNamespace
from typing import Any

from torch.distributions import Distribution

from torch_flowprune.torch_internals import registered_leaves


def tree_leaves(value: Any) -> list[Any]:
    """In order, as torch has them; of a dataclass, a namespace and a distribution the attributes too."""
    leaves: list[Any] = []
    for leaf in registered_leaves(value):
        by_name = isinstance(leaf, (SimpleNamespace, Distribution)) or (
            is_dataclass(leaf) and not isinstance(leaf, type)
        )
        leaves += tree_leaves(dict(vars(leaf))) if by_name else [leaf]
    return leaves

"""The values that others hold."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from torch_flowprune.inputs import tree_leaves


@dataclass
class Found:
    logits: Tensor
    more: list[Tensor]


def test_what_has_its_values_in_attributes_is_nested_too():
    found = Found(torch.ones(1), [torch.ones(2), SimpleNamespace(last=torch.ones(3))])
    assert [len(leaf) for leaf in tree_leaves({"found": found})] == [1, 2, 3]
    normal = torch.distributions.Normal(torch.zeros(2), torch.ones(2))
    assert [leaf.tolist() for leaf in tree_leaves(normal) if isinstance(leaf, Tensor)] == [[0, 0], [1, 1]]
    assert tree_leaves(Found) == [Found]

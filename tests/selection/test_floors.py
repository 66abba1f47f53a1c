"""How much goes from which layers: floors, and layers that were pruned before."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import torch_flowprune as fp


def of_two(*values: list[float]) -> nn.Module:
    """Layers of these weights."""
    model = nn.Sequential(*(nn.Linear(len(row), 1, bias=False) for row in values))
    for layer, row in zip(model, values, strict=True):
        layer.weight.data.copy_(torch.tensor([row]))
    return model


def left(model: nn.Module) -> list[list[float]]:
    return [layer.weight.flatten().tolist() for layer in model]


def test_floors_are_of_what_lives() -> None:
    """A layer's dead units do not count among those it keeps, and do not go a second time."""
    model = of_two([1, 2, 3, 4, 5, 6], [7, 8, 9, 10])
    fp.global_prune(model, amount=2)
    fp.global_prune(model, amount=2, min_keep=3)
    assert left(model) == [[0, 0, 0, 4, 5, 6], [0, 8, 9, 10]]


@pytest.mark.parametrize(("min_keep", "expected"), [(3, [3, 3]), (0.5, [3, 3]), (0.1, [2, 4]), (0.0, [2, 4])])
def test_a_layer_that_keeps_its_floor_leaves_the_rest_to_the_others(min_keep: float, expected: list[int]) -> None:
    model = of_two([1, 2, 3, 4, 5, 6], [7, 8, 9, 10])
    fp.global_prune(model, amount=4, min_keep=min_keep)
    assert [sum(value != 0 for value in layer) for layer in left(model)] == expected

"""The smaller model against the masked one: float64, everything random, each channel by itself and many at once."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from channel_cases import CASES, Attention, Case, Fn, assert_equal_without, coupled, randomised, with_masks
from torch import nn

from torch_flowprune.coupling import couple, masks
from torch_flowprune.shrink import ShrinkError, describe, rebuild, relative_error, shrink

PRUNABLE = [name for name, case in CASES.items() if case.groups]


@pytest.mark.slow
@pytest.mark.parametrize("name", PRUNABLE)
def test_each_channel_by_itself(name: str) -> None:
    model, x, coupling = coupled(CASES[name])
    for group in coupling.groups:
        for unit in range(group.size):
            assert_equal_without(model, x, coupling, {group.name: [unit]})


@pytest.mark.parametrize("name", PRUNABLE)
def test_the_last_channel_of_each_group(name: str) -> None:
    model, x, coupling = coupled(CASES[name])
    for group in coupling.groups:
        assert_equal_without(model, x, coupling, {group.name: [group.size - 1]})


@pytest.mark.parametrize("name", PRUNABLE)
def test_half_of_every_group(name: str) -> None:
    model, x, coupling = coupled(CASES[name])
    removed = {g.name: torch.randperm(g.size)[: g.size // 2].tolist() for g in coupling.groups}
    small = assert_equal_without(model, x, coupling, removed)
    assert type(small) is type(model)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", PRUNABLE)
def test_the_shrunk_model_has_a_coupling_of_its_own_and_shrinks_again(name: str) -> None:
    model, x, coupling = coupled(CASES[name])
    small = assert_equal_without(model, x, coupling, {g.name: [0] for g in coupling.groups})
    again = couple(small, x)
    sizes = {g.name: g.size for g in again.groups}
    assert all(sizes[g.name] == g.size - 1 for g in coupling.groups if g.size > 2)
    if again.groups:
        assert_equal_without(small, x, again, {g.name: [g.size - 1] for g in again.groups})

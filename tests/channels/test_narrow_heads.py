"""Heads that become narrower, in the place of fewer: queries and keys by dimension, values by dimension."""

from __future__ import annotations

import copy

import pytest
import torch
from channel_cases import CASES, assert_equal_without, coupled

import torch_flowprune as fp

# name -> the groups of attention: units are dimensions of all heads at once
NARROW = {
    "attention": {"q.weight": 3, "v.weight": 3},
    "attention fused": {"qkv.weight": 3},
    "attention manual": {"q.weight": 3, "v.weight": 3},
    "attention manual fused": {"qkv.weight": 3},
    "attention shared keys": {"q.weight": 3, "v.weight": 3},
    "grouped queries, expanded": {"q.weight": 3, "v.weight": 3},
    "relative position table": {"qkv.weight": 3},
    "multi-head attention of torch": {"a.weight": 8, "attn.in_proj_weight": 2, "attn.out_proj.weight": 8},
    "residual width, LayerNorm": {"0.weight": 8, "1.attn.q.weight": 3, "1.attn.v.weight": 3, "1.up.weight": 10},
    "linear": {"0.weight": 5},
}


@pytest.mark.parametrize("name", NARROW)
def test_the_widths_of_heads_are_groups(name: str) -> None:
    model, x, _ = coupled(CASES[name])
    assert {group.name: group.size for group in fp.couple(model, x, narrow_heads=True).groups} == NARROW[name]


@pytest.mark.parametrize("name", NARROW)
def test_each_dimension_by_itself_and_half_of_all(name: str) -> None:
    """Without a word on heads: by which labels the masks are channels is found."""
    model, x, _ = coupled(CASES[name])
    coupling = fp.couple(model, x, narrow_heads=True)
    for group in coupling.groups:
        assert_equal_without(model, x, coupling, {group.name: [group.size - 1]})
    halves = {group.name: list(range(0, group.size, 2)) for group in coupling.groups}
    assert_equal_without(model, x, coupling, halves)


@pytest.mark.parametrize("name", ["attention", "attention fused"])
def test_a_coupling_of_narrow_heads_is_known_when_it_is_given(name: str) -> None:
    model, x, _ = coupled(CASES[name])
    model, coupling = copy.deepcopy(model), fp.couple(model, x, narrow_heads=True)
    fp.global_prune(model, "magnitude", granularity="channel", coupling=coupling, allocation={"*": 0.5})
    small = fp.shrink(model, x, coupling=coupling)
    torch.testing.assert_close(small(x), model(x), rtol=1e-10, atol=1e-12)
    assert small.proj.in_features == small.num_heads == 4
    assert coupling.costs.of(coupling.costs.kept).parameters == sum(p.numel() for p in model.parameters())


def test_a_pruner_narrows_heads_and_goes_on_with_the_smaller_model() -> None:
    model, x, _ = coupled(CASES["residual width, LayerNorm"])
    model = copy.deepcopy(model)
    coupling = fp.couple(model, x, narrow_heads=True)
    pruner = fp.Pruner(model, "magnitude", 0.5, rounds=2, granularity="channel", coupling=coupling)
    while not pruner.done:
        pruner.step()
        expected = model(x)
        model = fp.shrink(model, x, pruner=pruner)
        torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12)
    assert not fp.masks(model)

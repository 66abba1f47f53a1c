"""What a range says can be reached is reached, and nothing below it."""

from __future__ import annotations

import pytest
from residual_net import X, build
from torch import nn

import torch_flowprune as fp

OPTIONS = {"granularity": "channel", "example_inputs": X}


@pytest.mark.parametrize("cost", ["parameters", "flops", "memory"])
@pytest.mark.parametrize("bounds", [{}, {"min_keep": 2}, {"max_sparsity": 0.5}, {"round_to": 2}, {"exclude": "stem"}])
def test_the_least_can_be_asked_for_and_no_less(cost: str, bounds: dict[str, object]) -> None:
    model = build()
    found = fp.range(model, X, cost=cost, **bounds)
    assert found.dense == found.now
    assert not fp.masks(model)
    report = fp.global_prune(model, at_most={cost: found.least}, **OPTIONS, **bounds)
    assert [one.left for one in report.spent] == [found.least]
    small = fp.couple(fp.shrink(model, X), X).costs
    assert small.count(cost, small.all) == found.least
    text = rf"it can be reduced to {found.least:,} "
    with pytest.raises(ValueError, match=text):
        fp.global_prune(build(), at_most={cost: found.least - 1}, **OPTIONS, **bounds)
    now = fp.range(model, X, cost=cost, **bounds)
    assert (now.dense, now.now) == (found.dense, found.least)
    assert found.sparsity == 1 - found.least / found.dense


def test_in_milliseconds_of_a_table() -> None:
    table = fp.LatencyTable(timer=lambda runs, device: [1e-6 * run().numel() for run in runs], multiple=1)
    found = fp.range(build(), X, cost=table)
    assert found.cost == "latency"
    assert 0 < found.least < found.dense
    report = fp.global_prune(build(), at_most={table: found.least + 1e-6}, **OPTIONS)
    assert report.spent[0].left == pytest.approx(found.least, abs=2e-6)
    assert str(found).startswith(f"latency: {found.least:,.10g} to {found.dense:,.10g} ms, now")


def test_units_of_any_granularity() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    weights = fp.range(model, granularity="weight", cost="units", min_keep=0.5)
    assert (weights.dense, weights.now, weights.least) == (36, 36, 18)
    filters = fp.range(model, granularity="filter", cost="units")
    assert (filters.dense, filters.least, filters.sparsity) == (8, 2, 0.75)
    with pytest.raises(ValueError, match="cost='flops' counts what shrink leaves"):
        fp.range(model, granularity="weight")


def test_words_are_checked() -> None:
    with pytest.raises(TypeError, match="range does not take min_kep=: did you mean min_keep="):
        fp.range(build(), X, min_kep=1)
    with pytest.raises(ValueError, match="cost should be one of"):
        fp.range(build(), X, cost="watts")


def test_a_star_leaves_pythons_range_alone() -> None:
    names: dict[str, object] = {}
    exec("from torch_flowprune import *", names)
    assert "range" not in names
    assert callable(fp.range)

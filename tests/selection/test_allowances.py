"""Targets in amounts, several at once: each is met, and with one unit fewer one of them would not be."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from residual_net import X, build
from torch import nn

import torch_flowprune as fp
from torch_flowprune.selection.goal import rounded_up, share_of

OPTIONS = {"granularity": "channel", "example_inputs": X}


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def sizes(model: nn.Module) -> dict[str, int]:
    small = fp.couple(fp.shrink(model, X), X).costs
    return {cost: small.count(cost, small.all) for cost in ("parameters", "flops", "memory")}


def after(k: int) -> dict[str, int]:
    """What is left once the k lowest have gone, counted on the model that shrink makes."""
    model = build()
    fp.global_prune(model, amount=k, **OPTIONS, min_keep=1)
    return sizes(model)


LADDER = [after(k) for k in range(13)]


@pytest.mark.parametrize("asked", list(itertools.combinations(["parameters", "flops", "memory"], 2)))
@pytest.mark.parametrize(("first", "second"), [(0.8, 0.6), (0.5, 0.7), (0.45, 0.45)])
def test_both_targets_are_met_by_the_fewest_units(asked: tuple[str, str], first: float, second: float) -> None:
    amounts = {asked[0]: first * LADDER[0][asked[0]], asked[1]: second * LADDER[0][asked[1]]}
    enough = [all(step[cost] <= most for cost, most in amounts.items()) for step in LADDER]
    if not any(enough):
        with pytest.raises(ValueError, match="it can be reduced to"):
            fp.global_prune(build(), at_most=amounts, **OPTIONS)
        return
    model = build()
    report = fp.global_prune(model, at_most=amounts, **OPTIONS)
    assert report.pruned == enough.index(True)
    found = sizes(model)
    assert [(one.cost, one.left, one.dense) for one in report.spent] == [
        (cost, found[cost], LADDER[0][cost]) for cost in asked
    ]
    assert all(one.left <= one.asked == int(amounts[one.cost]) for one in report.spent)


def test_a_share_and_an_amount_are_both_met() -> None:
    by_share = fp.global_prune(build(), sparsity=0.3, cost="flops", **OPTIONS)
    both = fp.global_prune(
        build(), sparsity=0.3, cost="flops", at_most={"parameters": 0.5 * LADDER[0]["parameters"]}, **OPTIONS
    )
    assert both.pruned > by_share.pruned
    assert both.left.parameters <= 0.5 * LADDER[0]["parameters"]
    loose = fp.global_prune(build(), sparsity=0.3, cost="flops", at_most={"parameters": 10**9}, **OPTIONS)
    assert loose.pruned == by_share.pruned


def milliseconds(factor: float = 1.0) -> fp.LatencyTable:
    """A clock that takes what an operator writes, and no time."""
    return fp.LatencyTable(timer=lambda runs, device: [1e-6 * factor * run().numel() for run in runs], multiple=1)


def test_milliseconds_are_those_of_the_table() -> None:
    table, model = milliseconds(), build()
    costs = fp.couple(model, X).costs
    dense = table.milliseconds(costs.calls(costs.all), costs.device)
    report = fp.global_prune(model, at_most={table: 0.6 * dense}, **OPTIONS)
    small = fp.couple(fp.shrink(model, X), X).costs
    taken = table.milliseconds(small.calls(small.all), small.device)
    (spent,) = report.spent
    assert spent.cost == "latency"
    assert spent.left == pytest.approx(taken, abs=1e-5)
    assert taken <= 0.6 * dense + 1e-6
    one_less = build()
    fp.global_prune(one_less, amount=report.pruned - 1, min_keep=1, **OPTIONS)
    more = fp.couple(fp.shrink(one_less, X), X).costs
    assert table.milliseconds(more.calls(more.all), more.device) > 0.6 * dense
    assert f"latency: {spent.left:,.10g} of {spent.dense:,.10g} ms left" in str(report)


def test_a_target_that_is_met_removes_nothing_and_again_is_no_mistake() -> None:
    model = build()
    assert fp.global_prune(model, at_most={"parameters": 10**6}, **OPTIONS).pruned == 0
    first = fp.global_prune(model, at_most={"parameters": 0.6 * LADDER[0]["parameters"]}, **OPTIONS)
    again = fp.global_prune(model, at_most={"parameters": 0.9 * LADDER[0]["parameters"]}, **OPTIONS)
    assert (first.pruned > 0, again.newly_pruned) == (True, 0)


@pytest.mark.parametrize("allocation", ["global", "layer", "erk", "lamp"])
@pytest.mark.parametrize("round_to", [1, 2])
def test_with_every_allocation_and_in_rounds(allocation: str, round_to: int) -> None:
    asked = {"parameters": 0.6 * LADDER[0]["parameters"], "flops": 0.6 * LADDER[0]["flops"]}
    model = build()
    words = {"allocation": allocation, "round_to": round_to, "at_most": asked, **OPTIONS}
    report = fp.global_prune(model, rounds=3, schedule="linear", **words)
    assert all(one.left <= one.asked for one in report.spent)
    pruner = fp.Pruner(build(), "magnitude", rounds=3, schedule="linear", **words)
    left = [pruner.step().left for _ in range(3)]
    assert [one.parameters for one in left] == sorted((one.parameters for one in left), reverse=True)
    assert left[0].parameters > asked["parameters"]
    assert left[-1].parameters <= asked["parameters"] and left[-1].flops <= asked["flops"]
    assert pruner.done


def test_a_second_target_is_come_by_as_the_share_is() -> None:
    """In two linear rounds half of each way is behind the first."""
    words = {"cost": "flops", "at_most": {"parameters": 0.4 * LADDER[0]["parameters"]}, **OPTIONS}
    pruner = fp.Pruner(build(), "magnitude", 0.2, rounds=2, schedule="linear", **words)
    first, second = pruner.step(), pruner.step()
    asked = [next(one.asked for one in report.spent if one.cost == "parameters") for report in (first, second)]
    assert asked[0] == pytest.approx(0.7 * LADDER[0]["parameters"], abs=1)
    assert asked[1] == int(0.4 * LADDER[0]["parameters"])


def test_a_multiple_that_a_target_does_not_allow_is_said_and_not_missed() -> None:
    """Widths of eight of eight channels are all or nothing: no smaller model has them."""
    with pytest.raises(ValueError, match=r"it can be reduced to [\d,]+ parameters, and \d+ parameters were asked"):
        fp.global_prune(build(), sparsity=0.9, cost="parameters", round_to=8, **OPTIONS)


WRONG = [
    ({"at_most": {"flops": 1e3}, "sparsity": 0.5}, ValueError, "give both or neither of sparsity="),
    ({"at_most": {"flops": 1e3}, "amount": 3}, ValueError, "give both or neither of sparsity="),
    ({"at_most": {"flops": 1e3}, "cost": "flops"}, ValueError, "got cost='flops'"),
    ({"at_most": {"units": 3}}, ValueError, "'units' should be one of parameters, flops, memory, latency"),
    ({"at_most": {"flop": 3}}, ValueError, "'flop' should be one of parameters"),
    ({"at_most": {"flops": 0}}, ValueError, "'flops' should be a positive number, got 0"),
    ({"at_most": {"flops": math.nan}}, ValueError, "'flops' should be a positive number, got nan"),
    ({"at_most": {"flops": True}}, ValueError, "'flops' should be a positive number, got True"),
    ({"at_most": {}}, TypeError, "at_most should be a mapping such as"),
    ({"at_most": 12.5}, TypeError, "at_most should be a mapping such as .'latency': 12.5. .milliseconds., got 12.5"),
    ({"at_most": {"parameters": 1}}, ValueError, r"it can be reduced to \d+ parameters, and 1 parameters were"),
    (
        {"at_most": {"parameters": 100}, "allocation": {"*": 0.5}},
        ValueError,
        "decides how much is pruned from each layer",
    ),
]


@pytest.mark.parametrize(("words", "kind", "text"), WRONG)
def test_what_cannot_be_meant_is_said(words: dict[str, object], kind: type[Exception], text: str) -> None:
    model = build()
    with pytest.raises(kind, match=text):
        fp.global_prune(model, **OPTIONS, **words)
    assert not fp.masks(model)


def test_weights_have_no_such_target() -> None:
    with pytest.raises(ValueError, match="cost='parameters' counts what shrink leaves"):
        fp.global_prune(build(), at_most={"parameters": 100})


def test_a_comparison_takes_a_second_target() -> None:
    data = (X, torch.zeros(len(X), dtype=torch.long))
    words = {"cost": "flops", "at_most": {"parameters": 0.5 * LADDER[0]["parameters"]}, **OPTIONS}
    plain, both = (
        fp.compare(build(), "magnitude", 0.2, data, **options) for options in ({**words, "at_most": None}, words)
    )
    assert both.outcomes[0].sparsity > plain.outcomes[0].sparsity
    with pytest.raises(ValueError, match="give both or neither"):
        fp.compare(build(), "magnitude", 0.2, data, **{**words, "cost": "units"})


@given(st.integers(1, 10**12), st.floats(0, 1))
@settings(max_examples=200)
def test_a_share_of_so_many_is_so_many(total: int, share: float) -> None:
    gone = int(share * total)
    assert rounded_up(share_of(gone, total), total) == gone
    assert share_of(gone, total) == pytest.approx(gone / total)

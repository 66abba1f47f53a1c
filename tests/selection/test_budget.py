"""A budget over layers whose units cost differently, against every choice of units there is."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import torch_flowprune as fp
from torch_flowprune.scoring import Candidates
from torch_flowprune.scoring.candidates import channel_candidates
from torch_flowprune.scoring.unit_scores import Scores
from torch_flowprune.selection.allocation import Allocation, gone_share
from torch_flowprune.selection.budget import Budget, living_units
from torch_flowprune.selection.choice import choose
from torch_flowprune.selection.goal import Goal
from torch_flowprune.selection.plan import Plan

X = torch.ones(2, 3)
OPTIONS = {"granularity": "channel", "example_inputs": X, "cost": "parameters", "normalize": None}


def net() -> nn.Module:
    """Two hidden layers: of 3 units that cost some twenty parameters each, and of 12 that cost six."""
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 12), nn.Tanh(), nn.Linear(12, 2))


def cost(few: int, many: int) -> int:
    """Parameters where so many units of the two layers are left, counted by hand."""
    return (3 * few + few) + (few * many + many) + (many * 2 + 2)


def budget(least: dict[str, int] | None = None) -> Budget:
    found = channel_candidates(net(), X)
    made = Budget.of(found, "parameters", least)
    assert made is not None
    return made


def kept(few: int, many: int) -> dict[str, torch.Tensor]:
    return {"0.weight": torch.arange(3) < few, "2.weight": torch.arange(12) < many}


SIZES = list(itertools.product(range(1, 4), range(1, 13)))


@pytest.mark.parametrize(("few", "many"), SIZES)
def test_what_is_left_is_counted(few: int, many: int) -> None:
    assert budget().left(kept(few, many)) == cost(few, many)
    assert budget().total == cost(3, 12)


@pytest.mark.parametrize(("few", "many"), SIZES)
def test_more_has_gone_than_was_needed_where_any_unit_could_come_back(few: int, many: int) -> None:
    back = [cost(few + 1, many)] if few < 3 else []
    back += [cost(few, many + 1)] if many < 12 else []
    for allowed in {*back, *(value - 1 for value in back), cost(few, many)}:
        expected = bool(back) and all(value <= allowed for value in back)
        assert budget().is_overdrawn(kept(few, many), allowed) is expected, allowed


def test_any_unit_that_went_comes_back() -> None:
    """Not the last or the first of a layer: a unit that lives costs nothing to bring back."""
    units = {"0.weight": torch.tensor([True, False, True]), "2.weight": torch.arange(12) < 12}
    assert budget().is_overdrawn(units, cost(3, 12))
    assert not budget().is_overdrawn(units, cost(3, 12) - 1)


def scored(few: list[float], many: list[float]) -> dict[str, torch.Tensor]:
    return {"0.weight": torch.tensor(few), "2.weight": torch.tensor(many)}


def test_the_same_target_again_is_no_mistake_where_a_small_unit_could_come_back() -> None:
    """A large channel overshot the target, so that a small one need not have gone: the order was the scores'."""
    model = net()
    scores = scored([1, 2, 3], [0, *range(4, 15)])
    target = (cost(3, 12) - cost(3, 11) + 1) / cost(3, 12)
    first = fp.global_prune(model, scores=scores, sparsity=target, **OPTIONS)
    assert first.left.parameters == cost(2, 11)
    assert cost(2, 12) <= (1 - target) * cost(3, 12) < cost(3, 11)
    again = fp.global_prune(model, scores=scores, sparsity=target, **OPTIONS)
    assert again.newly_pruned == 0
    with pytest.raises(ValueError, match="what is pruned stays pruned: sparsity=0.05 is lower"):
        fp.global_prune(model, scores=scores, sparsity=0.05, **OPTIONS)


@pytest.mark.parametrize("most", [0, 1, 7, 11])
def test_the_fewest_that_will_do(most: int) -> None:
    """Never are more asked for than can go: that would be an error."""

    def kept_without(k: int) -> dict[str, torch.Tensor]:
        assert 0 <= k <= most
        return kept(3, 12 - k)

    for allowed in range(cost(3, 12 - most) - 2, cost(3, 12) + 3):
        needed = next((k for k in range(most + 1) if cost(3, 12 - k) <= allowed), None)
        if needed is None:
            with pytest.raises(ValueError, match=r"at most .* of the model's 86 parameters can be removed"):
                budget({"0.weight": 3, "2.weight": 12 - most}).fewest(kept_without, most, allowed)
        else:
            assert budget().fewest(kept_without, most, allowed) == needed


@pytest.mark.parametrize(("few", "many"), [(1, 1), (2, 5), (3, 12)])
def test_what_is_reachable_is_what_the_least_of_the_living_units_cost(few: int, many: int) -> None:
    floored = budget({"0.weight": few, "2.weight": many})
    units = {"0.weight": torch.ones(3).bool(), "2.weight": torch.ones(12).bool()}
    floored.check_reachable(units, cost(few, many))
    with pytest.raises(
        ValueError, match="parameters can be removed, and .* should: it can be reduced to .* parameters, and"
    ):
        floored.check_reachable(units, cost(few, many) - 1)


def test_a_layer_without_a_floor_may_go_whole() -> None:
    units = {"0.weight": torch.ones(3).bool(), "2.weight": torch.ones(12).bool()}
    floored = budget({"2.weight": 5})
    floored.check_reachable(units, cost(0, 5))
    with pytest.raises(ValueError, match="can be removed, and"):
        floored.check_reachable(units, cost(0, 5) - 1)


def test_dead_units_are_not_among_the_least() -> None:
    """Of a layer that has lost its first units, the first that live stay."""
    units = {"0.weight": torch.tensor([False, True, True]), "2.weight": torch.arange(12) >= 10}
    floored = budget({"0.weight": 2, "2.weight": 2})
    floored.check_reachable(units, cost(2, 2))
    with pytest.raises(ValueError, match="can be removed, and"):
        floored.check_reachable(units, cost(2, 2) - 1)


def test_the_error_says_how_much_can_go_and_what_stays() -> None:
    floored = budget({"0.weight": 3, "2.weight": 1})
    with pytest.raises(
        ValueError,
        match=r"^at most 76\.7% of the model's 86 parameters can be removed, and 88\.4% should: it can be reduced to "
        r"20 parameters, and 10 parameters were asked for \(fp\.range shows this before pruning\); each group of "
        r"channels keeps one at least \(min_keep= may ask for more, round_to= for whole multiples\), and what is not "
        r"coupled stays whole\. Most of what stays is in 0\.weight \(9\), 0\.bias \(3\), 2\.weight \(3\); "
        r"print\(fp\.couple\(model, example_inputs\)\) lists what cannot be removed, and why$",
    ):
        floored.check_reachable(kept(3, 12), 10)


def test_living_units_are_on_the_host_one_flag_a_unit() -> None:
    model = net()
    fp.global_prune(
        model, scores=scored([1, 0, 3], list(range(4, 16))), amount=1, granularity="channel", example_inputs=X
    )
    units = living_units(channel_candidates(model, X))
    assert {name: alive.tolist() for name, alive in units.items()} == {
        "0.weight": [True, False, True],
        "2.weight": [True] * 12,
    }
    assert {(alive.dtype, alive.device.type) for alive in units.values()} == {(torch.bool, "cpu")}


# -- the plan made of it ------------------------------------------


def pruned(few: int, many: int) -> nn.Module:
    """The net with the first units of each layer left."""
    model = net()
    scores = scored([2.0 - i for i in range(3)], [11.0 - i for i in range(12)])
    for name, left in (("0.weight", few), ("2.weight", many)):
        units = {**OPTIONS, "cost": "units", "min_keep": 0}
        fp.global_prune(model, scores={name: scores[name]}, amount=len(scores[name]) - left, include=name, **units)
    return model


def candidates(model: nn.Module) -> Candidates:
    return channel_candidates(model, X)


def plan(model: nn.Module, rounds: int = 1, least: dict[str, int] | None = None, **share: float) -> Plan:
    goal = Goal(share.get("sparsity"), share.get("amount"), rounds, "linear")
    return Allocation(cost="parameters", normalize=None, min_keep=least).plan(candidates(model), goal)


def gone_after(made: Plan) -> tuple[int, ...]:
    assert made.spending is not None
    (only,) = made.spending.allowances
    return only.gone_after


@pytest.mark.parametrize(("few", "many"), [(3, 12), (2, 12), (3, 5), (1, 2)])
def test_the_share_that_is_gone(few: int, many: int) -> None:
    found = candidates(pruned(few, many))
    assert gone_share(found, "parameters") == pytest.approx(1 - cost(few, many) / cost(3, 12))
    assert gone_share(found, "units") == gone_share(found) == pytest.approx(1 - (few + many) / 15)
    assert gone_share({}) == 0


@pytest.mark.parametrize(
    ("share", "gone"),
    [
        ({"sparsity": 0.5}, 43),
        ({"sparsity": 0.51}, 44),  # never above what is allowed: 43.86 is rounded up
        ({"sparsity": 0.18}, 16),  # just what is gone already
        ({"amount": 0.5}, 16 + 35),
        ({"amount": 20}, 16 + 20),
        ({"amount": 0}, 16),
    ],
)
def test_a_target_is_of_the_whole_and_an_amount_of_what_is_left(share: dict[str, float], gone: int) -> None:
    assert (cost(3, 12), cost(2, 12)) == (86, 70)
    assert gone_after(plan(pruned(2, 12), **share)) == (gone,)


def test_rounds_rise_from_what_is_gone_to_the_target() -> None:
    assert gone_after(plan(pruned(2, 12), rounds=3, sparsity=0.5)) == (25, 34, 43)


def test_a_target_out_of_reach_is_said_before_the_first_round() -> None:
    with pytest.raises(ValueError, match="can be removed, and 95.3% should"):
        plan(net(), rounds=2, sparsity=0.95)


@pytest.mark.parametrize("least", [{"0.weight": 3, "2.weight": 11}, {"0.weight": 2, "2.weight": 12}])
def test_no_more_is_tried_than_the_floors_leave(least: dict[str, int]) -> None:
    model = net()
    found, given = candidates(model), Scores(scored([1, 2, 3], [*range(4, 16)]), "own", "channel")
    choice = choose(found, given, plan(model, least=least, amount=1), 0)
    assert choice.kept == {name: min(least[name], units) for name, units in (("0.weight", 3), ("2.weight", 12))}


def test_layers_below_their_floors_have_nothing_to_give() -> None:
    """They lost units before there was a floor."""
    model, least = pruned(2, 8), {"0.weight": 3, "2.weight": 12}
    found, given = candidates(model), Scores(scored([1, 2, 3], [*range(4, 16)]), "own", "channel")
    choice = choose(found, given, plan(model, least=least, amount=0), 0)
    assert choice.kept == {"0.weight": 2, "2.weight": 8}

"""global_prune against its contract: exactly k, monotone, all or nothing, and what it predicts."""

import copy
import math
import re
import warnings
from fractions import Fraction
from itertools import pairwise

import cases
import numpy as np
import oracles
import pytest
import torch
from cases import CASES, every_case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import torch_flowprune as fp
from torch_flowprune.inputs.named_parameters.parameters import parameters_of, prunable

QUIET = pytest.mark.filterwarnings(
    "ignore::torch_flowprune.LayerCollapseWarning", "ignore::torch_flowprune.TiedScoresWarning"
)


def masks(model):
    """The mask of every default parameter, all true where it has none."""
    return {
        target.name: torch.ones_like(target.theta).bool() if target.mask is None else target.mask != 0
        for target in prunable(model)
    }


def gone(model):
    return sum(int((~mask).sum()) for mask in masks(model).values())


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}, [
        type(module) for module in model.modules()
    ]


def assert_as_before(model, before):
    state, kinds = before
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [type(module) for module in model.modules()] == kinds
    assert not any(module._forward_pre_hooks for module in model.modules())


RAW = {"normalize": None, "min_keep": 0}  # one ranking of the scores as they are, whatever it empties


@every_case
@pytest.mark.parametrize("method", ["magnitude", "loss_preservation", "gradient_norm_increase"])
@pytest.mark.parametrize("granularity", ["weight", "filter"])
@QUIET
def test_the_lowest_go_exactly_and_in_model_order(case, method, granularity):
    """The whole route on every net: scores by fp.scores, the selection by the oracle, the masks by plain indexing."""
    model, batches = case.model(), case.batches((4, 3))
    scores = fp.scores(model, method, batches, granularity=granularity)
    n = sum(map(len, scores.values()))
    k = round(0.4 * n)
    expected = dict(zip(scores, oracles.lowest(list(scores.values()), k), strict=True))
    known = parameters_of(model)
    report = fp.global_prune(model, method, 0.4, data=batches, granularity=granularity, **RAW)
    assert (report.units, report.pruned, report.newly_pruned) == (n, k, k)
    for name, mask in masks(model).items():
        axis = known[name].output_axis
        units = mask.flatten() if granularity == "weight" else mask.movedim(axis, 0).flatten(1).any(1)
        assert torch.equal(units, expected[name]), name
        if granularity == "filter":
            assert torch.equal(mask.movedim(axis, 0).flatten(1).all(1), units), "a filter goes whole"
    for target in parameters_of(model).values():
        if target.mask is not None:
            assert torch.equal(target.theta == 0, ~target.mask), target.name


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.floats(0, 1),
    st.sampled_from(["weight", "filter"]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
@QUIET
def test_exactly_k(sparsity, granularity, dtype):
    model = cases.cnn(dtype)
    report = fp.global_prune(model, "magnitude", sparsity, granularity=granularity, **RAW)
    assert report.pruned == round(sparsity * report.units)
    assert report.sparsity == report.pruned / report.units
    if granularity == "weight":
        assert gone(model) == report.pruned


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=4).map(sorted), st.sampled_from(["weight", "filter"]))
@QUIET
def test_calls_nest(sparsities, granularity):
    """Magnitude does not move with pruning, so many small calls are one large one."""
    stepwise, at_once = cases.cnn(), cases.cnn()
    before = masks(stepwise)
    for sparsity in sparsities:
        report = fp.global_prune(stepwise, "magnitude", sparsity, granularity=granularity, **RAW)
        assert report.pruned == round(sparsity * report.units)
        after = masks(stepwise)
        assert all((mask <= before[name]).all() for name, mask in after.items()), "what is pruned stays pruned"
        before = after
    fp.global_prune(at_once, "magnitude", sparsities[-1], granularity=granularity, **RAW)
    assert all(torch.equal(mask, before[name]) for name, mask in masks(at_once).items())


def test_what_is_pruned_is_no_candidate_though_others_score_lower():
    """A pruned weight scores 0, which is not the lowest of a signed measure: it must not be removed a second time."""
    model, batches = cases.mlp(), CASES["mlp"].batches()
    fp.global_prune(model, "gradient_norm_increase", 0.2, data=batches)
    first = masks(model)
    report = fp.global_prune(model, "gradient_norm_increase", 0.5, data=batches)
    assert gone(model) == report.pruned == round(0.5 * 52)
    assert all((mask <= first[name]).all() for name, mask in masks(model).items())
    assert report.newly_pruned == 26 - 10


def test_a_lower_sparsity_is_an_error():
    model = cases.mlp()
    fp.global_prune(model, sparsity=0.5)
    before = masks(model)
    with pytest.raises(
        ValueError,
        match=r"the model is already at sparsity 0.5, and what is pruned stays pruned: sparsity=0.3 is lower; give a "
        r"higher one, or amount=",
    ):
        fp.global_prune(model, sparsity=0.3)
    assert all(torch.equal(mask, before[name]) for name, mask in masks(model).items())
    assert fp.global_prune(model, sparsity=0.5).newly_pruned == 0


@pytest.mark.parametrize("sparsity", [0.3, 1 / 3, 0.9])
@pytest.mark.parametrize("schedule", fp.SCHEDULES)
def test_the_same_sparsity_again_in_rounds_changes_nothing(sparsity, schedule):
    model = cases.mlp()
    fp.global_prune(model, sparsity=sparsity)
    assert fp.global_prune(model, sparsity=sparsity, rounds=3, schedule=schedule).newly_pruned == 0


def test_filters_on_top_of_weights():
    """A filter is gone when nothing of it is left; what single weights went before stays gone."""
    model = cases.cnn()
    fp.global_prune(model, "magnitude", 0.5)
    weights = masks(model)
    report = fp.global_prune(model, "magnitude", 0.5, granularity="filter")
    assert report.pruned == 4
    assert all((mask <= weights[name]).all() for name, mask in masks(model).items())
    assert sum(layer.weights_pruned for layer in report.layers) == gone(model)


def test_no_pruning_leaves_no_hook():
    model = cases.mlp()
    before = snapshot(model)
    report = fp.global_prune(model, sparsity=0.0)
    assert (report.pruned, report.threshold) == (0, None)
    assert_as_before(model, before)


def test_a_layer_that_keeps_everything_gets_no_mask():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight.data += 10 * model[0].weight.data.sign()
    fp.global_prune(model, sparsity=0.25)
    assert [hasattr(layer, "weight_mask") for layer in model] == [False, True]


@QUIET
def test_everything_may_go():
    model = cases.mlp()
    assert fp.global_prune(model, sparsity=1.0).pruned == 52
    assert gone(model) == 52
    assert model(torch.ones(1, 4, dtype=torch.float64)).isfinite().all()


# amount


@pytest.mark.parametrize(
    ("amount", "expected"),
    [(0.25, 13), (10, 10), (0, 0), (1.0, 52), (1, 1), (np.float32(0.5), 26), (np.int64(7), 7), (Fraction(1, 4), 13)],
)
@QUIET
def test_amount_is_torchs(amount, expected):
    model = cases.mlp()
    assert fp.global_prune(model, amount=amount).pruned == expected == gone(model)


def test_amount_is_of_what_is_left():
    """.2 three times is 20, 36, 49 percent."""
    model = nn.Linear(10, 10, bias=False)
    assert [fp.global_prune(model, amount=0.2).pruned for _ in range(3)] == [20, 36, 49]


def test_amount_in_rounds():
    model = nn.Linear(10, 10, bias=False)
    fp.global_prune(model, sparsity=0.5)
    assert fp.global_prune(model, amount=0.5, rounds=3).pruned == 75


# scope


@pytest.mark.parametrize("granularity", ["weight", "filter"])
def test_each_layer_to_the_same_sparsity(granularity):
    model = cases.mlp()
    report = fp.global_prune(model, "magnitude", 0.5, scope="layer", granularity=granularity)
    assert [layer.pruned for layer in report.layers] == [round(0.5 * layer.units) for layer in report.layers]
    alone = cases.mlp()
    for name in ("0", "2", "4"):
        fp.global_prune(alone, "magnitude", 0.5, granularity=granularity, include=name)
    assert all(torch.equal(mask, masks(alone)[name]) for name, mask in masks(model).items()), (
        "local pruning is global pruning of one layer"
    )


def test_a_layer_further_than_the_others_is_named():
    model = cases.mlp()
    fp.global_prune(model, sparsity=0.8, include="2")
    with pytest.raises(
        ValueError,
        match="'2.weight' is already at sparsity 0.8, and what is pruned stays pruned: sparsity=0.5 is lower",
    ):
        fp.global_prune(model, sparsity=0.5, scope="layer")
    assert fp.global_prune(model, amount=0.5, scope="layer").pruned == 10 + 18 + 6


# min_keep


@pytest.mark.parametrize(
    ("min_keep", "least"),
    [
        (3, [3, 3, 3]),
        (0.5, [10, 10, 6]),
        (0.01, [1, 1, 1]),
        (0.35, [7, 7, 5]),
        (15, [15, 15, 12]),
        (0, [0, 0, 0]),
        (0.0, [0, 0, 0]),
    ],
)
@QUIET
def test_min_keep(min_keep, least):
    model = cases.mlp()
    model[4].weight.data *= 1e-3
    sparsity = min(0.8, (52 - sum(least)) / 52)
    report = fp.global_prune(model, sparsity=sparsity, min_keep=min_keep)
    assert report.pruned == round(sparsity * 52)
    assert all(layer.units - layer.pruned >= floor for layer, floor in zip(report.layers, least, strict=True))
    if least[0] == 3:
        assert report.layers[2].units - report.layers[2].pruned == 3, "the smallest layer is cut to its floor"


def test_min_keep_that_leaves_too_little():
    with pytest.raises(
        ValueError,
        match="47 of 52 units should be pruned, and at most 26 can: min_keep= keep the rest; prune less, or lower",
    ):
        fp.global_prune(cases.mlp(), sparsity=0.9, min_keep=0.5)


# rounds


@QUIET
@pytest.mark.parametrize("schedule", [*fp.SCHEDULES, lambda rounds, start, target: [start, start, target]])
def test_rounds_end_at_exactly_k(schedule):
    model, batches = cases.mlp(), CASES["mlp"].batches((4, 3))
    fp.global_prune(model, sparsity=0.1)
    report = fp.global_prune(model, "loss_preservation", 0.77, data=batches, rounds=3, schedule=schedule)
    assert report.pruned == gone(model) == round(0.77 * 52)
    assert report.newly_pruned == report.pruned - 5


@QUIET
def test_each_round_scores_anew():
    model, batches = cases.mlp(), CASES["mlp"].batches((4, 3))
    report = fp.global_prune(model, "gradient_norm_preservation", 0.6, data=batches, rounds=2, schedule="linear")
    by_hand = cases.mlp()
    one = fp.global_prune(by_hand, "gradient_norm_preservation", 0.3, data=batches)
    two = fp.global_prune(by_hand, "gradient_norm_preservation", 0.6, data=batches)
    assert all(torch.equal(mask, masks(by_hand)[name]) for name, mask in masks(model).items())
    assert report.predicted_loss_change == pytest.approx(
        one.predicted_loss_change + two.predicted_loss_change, rel=1e-10
    )
    assert [layer.newly_pruned for layer in report.layers] == [
        a.newly_pruned + b.newly_pruned for a, b in zip(one.layers, two.layers, strict=True)
    ]
    assert (report.threshold, report.loss) == (two.threshold, two.loss)
    single = cases.mlp()
    fp.global_prune(single, "gradient_norm_preservation", 0.6, data=batches)
    assert any(not torch.equal(mask, masks(single)[name]) for name, mask in masks(model).items()), (
        "scoring anew must matter here"
    )


def test_rounds_see_the_papers_numbers_of_filters():
    model, seen = nn.Conv2d(1, 400, 1), []

    def measure(theta):
        seen.append(int((theta == 0).all(-1).sum()))
        return theta.abs().sum(-1)

    fp.global_prune(model, measure, 0.75, granularity="filter", rounds=5, schedule="paper")
    kept = [0.625, 0.4545, 0.3571, 0.2941]
    assert seen == [0, *(400 - round(400 * share) for share in kept)]


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_all_or_nothing_when_a_round_fails(failing):
    model, batches, calls = cases.cnn(), CASES["cnn"].batches((4,)), []
    before = snapshot(model)

    def closure(model, batch):
        calls.append(1)
        if len(calls) == failing:
            raise ArithmeticError("in the middle")
        return F.cross_entropy(model(batch[0]), batch[1])

    with pytest.raises(ArithmeticError, match="in the middle"):
        fp.global_prune(model, "loss_preservation", 0.8, data=batches, closure=closure, rounds=3)
    assert len(calls) == failing
    assert_as_before(model, before)
    assert [id(p) for p in model.parameters()] == [id(p) for p in model.parameters()]


def test_all_or_nothing_keeps_the_pruning_there_was():
    model, calls = cases.mlp(), []
    fp.global_prune(model, sparsity=0.3)
    before, parameters = snapshot(model), list(model.parameters())

    def closure(model, batch):
        calls.append(1)
        if len(calls) == 3:
            raise ArithmeticError
        return F.cross_entropy(model(batch[0]), batch[1])

    with pytest.raises(ArithmeticError):
        fp.global_prune(model, "taylor", 0.8, data=CASES["mlp"].batch(4), closure=closure, rounds=3)
    state, kinds = before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [type(module) for module in model.modules()] == kinds
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert [len(layer._forward_pre_hooks) for layer in model] == [1, 0, 1, 0, 1]


# n:m


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4", "1:2", "4:8", "1:3", "2:3"])
@pytest.mark.parametrize(
    "build", [lambda n: nn.Linear(n, 3), lambda n: nn.Conv2d(n, 3, 2), lambda n: nn.Conv1d(2 * n, 4, 3, groups=2)]
)
def test_blocks(pattern, build):
    keep, m = map(int, pattern.split(":"))
    model = build(24)
    weight = model.weight.detach().clone()
    report = fp.global_prune(model, "magnitude", granularity=pattern)
    assert report.sparsity == pytest.approx(1 - keep / m)
    blocks = weight.movedim(1, -1).reshape(-1, m).abs()
    kept = model.weight_mask.movedim(1, -1).reshape(-1, m)
    assert (kept.sum(1) == keep).all()
    assert (blocks.masked_fill(~kept, math.inf).amin(1) >= blocks.masked_fill(kept, -math.inf).amax(1)).all()


@pytest.mark.parametrize(
    ("pattern", "sparsity"), [("2:4", 0.5), ("1:4", 0.75), ("1:3", 2 / 3), ("2:3", 1 / 3), ("3:10", 0.7), ("1:10", 0.9)]
)
def test_blocks_may_be_told_their_own_sparsity(pattern, sparsity):
    assert fp.global_prune(nn.Linear(60, 2), sparsity=sparsity, granularity=pattern).sparsity == pytest.approx(sparsity)


@pytest.mark.parametrize("options", [{"sparsity": 0.6}, {"amount": 0.5}, {"rounds": 2}, {"sparsity": 0.5, "rounds": 3}])
def test_blocks_and_another_amount(options):
    with pytest.raises(
        ValueError, match="granularity '2:4' is sparsity 0.5 in one round: leave sparsity=, amount= and rounds= out"
    ):
        fp.global_prune(nn.Linear(8, 2), granularity="2:4", **options)


def test_blocks_and_a_floor():
    with pytest.raises(
        ValueError, match="min_keep=0.9 has no part in n:m blocks, which keep n of every m: leave it out"
    ):
        fp.global_prune(nn.Linear(8, 2), granularity="2:4", min_keep=0.9)


@pytest.mark.parametrize("first", [True, False])
def test_blocks_beside_other_units(first):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(
        ValueError,
        match="n:m blocks for some parameters and other units for the rest: prune them in two calls, with include=",
    ):
        fp.global_prune(
            model,
            sparsity=0.5,
            granularity=lambda target: fp.Blocks(2, 4) if (target.name == "0.weight") == first else fp.Weights(),
        )
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    report = fp.global_prune(
        model, granularity=lambda target: fp.Blocks(2, 4) if target.name == "0.weight" else fp.Blocks(1, 4)
    )
    assert [layer.sparsity for layer in report.layers] == [0.5, 0.75]


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.7])
def test_blocks_on_top_of_weights(sparsity):
    """What is gone counts towards the pattern; a block with fewer left keeps what it has."""
    model = nn.Linear(16, 8, bias=False)
    fp.global_prune(model, "random", sparsity, generator=torch.Generator().manual_seed(0))
    before = model.weight_mask.clone()
    fp.global_prune(model, granularity="2:4")
    blocks = before.view(-1, 4).sum(1)
    assert (model.weight_mask <= before).all()
    assert torch.equal(model.weight_mask.view(-1, 4).sum(1), blocks.clamp(max=2))


# given scores


def test_score_once_prune_many():
    model, batches = cases.mlp(), CASES["mlp"].batches((4, 3))
    scores = fp.scores(model, "taylor", batches)
    for sparsity in (0.2, 0.5, 0.7):
        one, other = copy.deepcopy(model), copy.deepcopy(model)
        report = fp.global_prune(one, scores=scores, sparsity=sparsity)
        fp.global_prune(other, "taylor", sparsity, data=batches)
        assert report.method == "taylor"
        assert all(torch.equal(mask, masks(other)[name]) for name, mask in masks(one).items())


def test_given_scores_bring_their_granularity():
    model = cases.cnn()
    scores = fp.scores(model, granularity="filter")
    report = fp.global_prune(model, scores=scores, sparsity=0.5)
    assert (report.granularity, report.units, report.pruned) == ("filter", 8, 4)


@pytest.mark.parametrize("shaped", [False, True])
@pytest.mark.parametrize("by_pair", [False, True])
def test_scores_from_anywhere(shaped, by_pair):
    """Signed, whole numbers or infinite; by name or by pair; flat or shaped like the parameter.

    Only layers that have scores are pruned.
    """
    model = cases.mlp()
    values = torch.arange(12) - 20
    values[3] = 100
    scores = {(model[4], "weight") if by_pair else "4.weight": values.view(3, 4) if shaped else values}
    report = fp.global_prune(model, scores=scores, sparsity=0.5)
    assert [layer.name for layer in report.layers] == ["4.weight"]
    assert model[4].weight_mask.flatten().tolist() == [False, False, False, True] + [False] * 3 + [True] * 5
    assert report.method == "given scores"


@pytest.mark.parametrize("options", [{"include": nn.Linear}, {"include": "0"}, {}])
def test_scores_of_a_parameter_that_is_not_there_are_refused_however_the_others_are_picked(options):
    model = cases.mlp()
    scores = {**fp.scores(model), "9.weight": torch.rand(3)}
    with pytest.raises(ValueError, match="scores= has entries for parameters this model does not have: 9.weight"):
        fp.global_prune(model, scores=scores, sparsity=0.5, **options)
    assert fp.masks(model) == {}


def test_infinite_scores_protect_and_condemn():
    model = cases.mlp()
    scores = dict(fp.scores(model))
    scores["0.weight"] = torch.full((20,), math.inf)
    scores["4.weight"] = torch.full((12,), -math.inf)
    with pytest.warns(fp.LayerCollapseWarning):
        report = fp.global_prune(model, scores=scores, sparsity=0.5)
    assert [layer.pruned for layer in report.layers] == [0, 14, 12]


@pytest.mark.parametrize(
    ("scores", "text"),
    [
        ({"0.wieght": torch.ones(20)}, "scores= has entries for parameters this model does not have: 0.wieght"),
        ({"0.weight": torch.ones(19)}, "the scores of '0.weight' have shape (19,): expected one per unit, (20,)"),
        ({"0.weight": torch.ones(4, 5)}, "the scores of '0.weight' have shape (4, 5): expected one per unit, (20,)"),
        ({"0.weight": torch.full((20,), math.nan)}, "the scores of '0.weight' hold nan: they cannot be ranked"),
        (
            {"0.weight": torch.ones(20).bool()},
            "the scores of '0.weight' should be numbers with values, got torch.bool on cpu",
        ),
        (
            {"0.weight": torch.ones(20, device="meta")},
            "the scores of '0.weight' should be numbers with values, got torch.float32 on meta",
        ),
    ],
)
def test_bad_scores(scores, text):
    model = cases.mlp()
    before = snapshot(model)
    with pytest.raises(ValueError, match=re.escape(text)):
        fp.global_prune(model, scores=scores, sparsity=0.5)
    assert_as_before(model, before)


def test_scores_that_lack_a_layer():
    with pytest.raises(
        ValueError,
        match="scores= has no entry for '2.weight': compute scores for it too, or leave it out with exclude=",
    ):
        fp.global_prune(cases.mlp(), scores={"0.weight": torch.ones(20)}, sparsity=0.5, include="*")


def test_scores_of_no_layer():
    with pytest.raises(
        ValueError, match="scores= is empty: expected scores by parameter name, as fp.scores returns them"
    ):
        fp.global_prune(cases.mlp(), scores={}, sparsity=0.5)


# Bad arguments: each names what was expected and found, and the model is as it was


LOADER = [CASES["mlp"].batch(4)]
BAD = [
    (
        {},
        ValueError,
        "give sparsity= (of all prunable units, after the call) or amount= (torch's: of what is left), one of the two",
    ),
    ({"sparsity": 0.5, "amount": 0.5}, ValueError, "give sparsity= (of all prunable units, after the call) or amount="),
    ({"sparsity": 90}, ValueError, "sparsity=90 should be from 0.0 to 1.0; for 90 percent write 0.9"),
    ({"sparsity": -0.1}, ValueError, "sparsity=-0.1 should be from 0.0 to 1.0"),
    ({"sparsity": math.nan}, ValueError, "sparsity=nan should be from 0.0 to 1.0"),
    ({"sparsity": "0.5"}, TypeError, "sparsity should be a number from 0.0 to 1.0, got '0.5'"),
    ({"sparsity": True}, TypeError, "sparsity should be a number from 0.0 to 1.0, got True"),
    (
        {"amount": 53},
        ValueError,
        "amount=53 units should be pruned: expected 0 to 52, the number of units left to prune",
    ),
    ({"amount": 1.5}, ValueError, "amount=1.5 should be from 0.0 to 1.0"),
    ({"method": "magnitud", "sparsity": 0.5}, ValueError, "unknown measure 'magnitud'; did you mean 'magnitude'?"),
    ({"method": 3, "sparsity": 0.5}, TypeError, "method should be a measure's name or a function of rows"),
    ({"granularity": "kernel", "sparsity": 0.5}, ValueError, "unknown granularity 'kernel'"),
    (
        {"scope": "local", "sparsity": 0.5},
        ValueError,
        "scope should be 'global' (one ranking over all layers), 'layer' (each to the same sparsity) or 'row'",
    ),
    (
        {"min_keep": -1, "sparsity": 0.5},
        ValueError,
        "min_keep should be a number of units a layer keeps (int) or a fraction of the layer",
    ),
    ({"min_keep": 1.5, "sparsity": 0.5}, ValueError, "got 1.5"),
    ({"min_keep": True, "sparsity": 0.5}, ValueError, "got True"),
    ({"min_keep": math.nan, "sparsity": 0.5}, ValueError, "min_keep should be"),
    ({"rounds": 0, "sparsity": 0.5}, ValueError, "rounds should be a whole number of at least 1, got 0"),
    (
        {"rounds": 2, "schedule": "cosine", "sparsity": 0.5},
        ValueError,
        "unknown schedule 'cosine': expected one of linear, exponential, cubic, paper",
    ),
    (
        {"rounds": 2, "sparsity": 1.0},
        ValueError,
        "an exponential schedule never reaches sparsity 1.0: use schedule='linear'",
    ),
    (
        {"rounds": 2, "sparsity": 0.5, "scores": {"0.weight": torch.ones(20)}},
        ValueError,
        "rounds=2 computes new scores before each round, and scores= are fixed",
    ),
    (
        {"rounds": 2, "sparsity": 0.5, "method": "taylor", "data": iter(LOADER)},
        ValueError,
        "rounds=2 reads the data in every round, and this iterator",
    ),
    ({"method": "taylor", "sparsity": 0.5}, ValueError, "this needs data: pass data="),
    ({"method": "taylor", "sparsity": 0.5, "data": []}, ValueError, "the data is empty"),
    (
        {"method": "taylor", "sparsity": 0.5, "data": LOADER, "mode": "test"},
        ValueError,
        "mode should be 'eval' or 'train'",
    ),
    (
        {"method": "taylor", "sparsity": 0.5, "data": LOADER, "temperature": 0},
        ValueError,
        "temperature should be above 0",
    ),
    (
        {"method": "taylor", "sparsity": 0.5, "data": LOADER, "max_samples": 0},
        ValueError,
        "max_samples should be a whole number of at least 1",
    ),
    ({"method": "distance_biased_loss_preservation", "sparsity": 0.5, "data": LOADER}, ValueError, "pass theta0="),
    ({"method": "synflow", "sparsity": 0.5}, ValueError, "pass example_inputs="),
    (
        {"method": "random", "generator": 3, "sparsity": 0.5},
        TypeError,
        "generator should be a torch.Generator on the CPU",
    ),
    ({"sparsity": 0.5, "include": "hed"}, ValueError, "include='hed' matches no parameter"),
    ({"sparsity": 0.5, "parameters": []}, ValueError, "parameters= is empty"),
]


@pytest.mark.parametrize(("options", "error", "text"), BAD)
def test_bad_arguments(options, error, text):
    model = cases.mlp()
    before = snapshot(model)
    with pytest.raises(error, match=re.escape(text)):
        fp.global_prune(model, **options)
    assert_as_before(model, before)


def test_not_a_model():
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got list"):
        fp.global_prune([nn.Linear(2, 2)], sparsity=0.5)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "parametriz|nothing to prune"),
        (
            lambda: nn.LazyLinear(4),
            "'1.weight' has no shape yet (a lazy module): run one batch through the model first",
        ),
        (
            lambda: nn.Linear(4, 4, device="meta"),
            "'1.weight' is on the meta device and has no values: load or initialise the model first",
        ),
    ],
)
def test_a_parameter_that_cannot_carry_a_mask_stops_everything(build, text):
    first = nn.Linear(4, 4)
    model = nn.Sequential(first, build())
    options = {"include": ["0", "1*"]} if "parametriz" in text else {}
    with pytest.raises(ValueError, match=text if "|" in text else re.escape(text)):
        fp.global_prune(model, sparsity=0.5, **options)
    assert type(first) is nn.Linear
    assert not first._forward_pre_hooks


# Warnings


def test_a_layer_that_loses_everything_is_named():
    model = cases.mlp()
    model[2].weight.data *= 1e-6
    with pytest.warns(
        fp.LayerCollapseWarning,
        match="nothing is left of 2.weight: no signal passes there any more; min_keep= keeps some units of every layer",
    ):
        fp.global_prune(model, sparsity=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fp.global_prune(model, sparsity=0.6)


def test_ties_that_decide_are_named():
    model = nn.Sequential(nn.Linear(20, 5), nn.Linear(5, 5))
    nn.init.zeros_(model[0].weight)
    with pytest.warns(
        fp.TiedScoresWarning,
        match=r"75 kept units have exactly the score of the last pruned unit, 0: .*; a zero-initialised branch or "
        r"head",
    ):
        report = fp.global_prune(model, sparsity=0.2)
    assert report.tied == 75
    nn.init.constant_(model[1].weight, 0.5)
    with pytest.warns(
        fp.TiedScoresWarning,
        match=r"20 kept units have exactly the score of the last pruned unit, 0.5: model order decided, not the "
        r"measure$",
    ):
        fp.global_prune(model, amount=5, include="1")


def test_a_few_ties_are_no_warning():
    model = nn.Linear(20, 20)
    model.weight.data.view(-1)[:3] = 1e-9
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fp.global_prune(model, amount=1).tied == 2


# What was predicted


@pytest.mark.parametrize("name", ["mlp", "cnn", "attention", "tied"])
def test_the_predicted_change_is_the_sum_over_what_went(name):
    """−Σ θg and −2 Σ θ·Hg, added up by hand over the pruned weights, with the dense derivatives."""
    case = CASES[name]
    model, batches = case.model(), case.batches((4, 3))
    dense, theta = oracles.dense(model, batches), oracles.trainable(case.model())
    report = fp.global_prune(model, "gradient_norm_preservation", 0.3, data=batches)
    pruned = {name: ~mask for name, mask in masks(model).items()}
    loss = -sum((theta[name] * dense.g[name])[where].sum().item() for name, where in pruned.items())
    norm = -2 * sum((theta[name] * dense.Hg[name])[where].sum().item() for name, where in pruned.items())
    assert report.predicted_loss_change == pytest.approx(loss, rel=1e-9)
    assert report.predicted_gradient_norm_change == pytest.approx(norm, rel=1e-9)
    assert report.loss == pytest.approx(dense.loss, rel=1e-12)
    assert report.samples == 7


def test_the_predicted_change_approximates_the_actual_one():
    """To first order: make what goes ten times smaller, and the prediction is off by a hundredth."""
    batches, errors = CASES["mlp"].batches((6, 4)), []
    for size in (1e-1, 1e-2, 1e-3):
        model = cases.mlp()
        model[2].weight.data[1:3] = size * model[2].weight.data[1:3].sign()
        before = oracles.dense(model, batches)
        report = fp.global_prune(
            model, lambda theta, g, Hg: theta.abs().sum(-1), 0.5, data=batches, include="2", granularity="filter"
        )
        after = oracles.dense(fp.remove(model), batches)
        norms = [oracles.flatten(one.g).square().sum().item() for one in (before, after)]
        assert model[2].weight[1:3].abs().sum() == 0
        errors.append(
            [
                report.predicted_loss_change - (after.loss - before.loss),
                report.predicted_gradient_norm_change - (norms[1] - norms[0]),
            ]
        )
    for coarse, fine in pairwise(errors):
        for one, other in zip(coarse, fine, strict=True):
            assert abs(other) < abs(one) / 50


def test_nothing_is_predicted_where_it_is_not_known():
    batch = CASES["mlp"].batch(4)
    report = fp.global_prune(cases.mlp(), "magnitude", 0.5)
    assert (report.predicted_loss_change, report.predicted_gradient_norm_change, report.loss, report.samples) == (
        None,
        None,
        None,
        0,
    )
    report = fp.global_prune(cases.mlp(), "taylor", 0.5, data=batch)
    assert report.predicted_loss_change is not None
    assert report.predicted_gradient_norm_change is None


def test_what_was_pruned_before_is_not_predicted_again():
    model, batches = cases.mlp(), CASES["mlp"].batches((4, 3))
    fp.global_prune(model, "taylor", 0.5, data=batches)
    report = fp.global_prune(model, "taylor", 0.5, data=batches)
    assert (report.newly_pruned, report.predicted_loss_change) == (0, 0)


# Which parameters


def test_pairs_as_torch_takes_them():
    model = cases.mlp()
    report = fp.global_prune(model, sparsity=0.5, parameters=[(model[0], "weight"), (model[0], "bias")])
    assert [layer.name for layer in report.layers] == ["0.weight", "0.bias"]
    assert (report.units, report.pruned) == (25, 12)


def test_a_tied_parameter_counts_once_and_masks_every_owner():
    model = CASES["tied"].model()
    report = fp.global_prune(model, sparsity=0.5)
    assert report.units == 15 + 9
    assert model.embed.weight_mask is model.decode.weight_mask
    assert torch.equal(model.embed.weight, model.decode.weight)
    assert int((model.decode.weight == 0).sum()) == report.layers[0].pruned


def test_a_wrapped_model_is_pruned_inside():
    model = cases.mlp()
    assert fp.global_prune(nn.DataParallel(model), sparsity=0.5).layers[0].name == "0.weight"
    assert gone(model) == 26


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_an_empty_parameter_takes_no_part():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 0))
    report = fp.global_prune(model, sparsity=0.5)
    assert [layer.units for layer in report.layers] == [16, 0]
    assert report.pruned == 8
    assert report.layers[1].sparsity == 0


def test_a_frozen_model_can_be_pruned_by_its_gradient():
    model, batch = cases.mlp().requires_grad_(False), CASES["mlp"].batch(4)
    trained = cases.mlp()
    fp.global_prune(model, "taylor", 0.5, data=batch)
    fp.global_prune(trained, "taylor", 0.5, data=batch)
    assert all(torch.equal(mask, masks(trained)[name]) for name, mask in masks(model).items())
    assert not any(p.requires_grad for p in model.parameters())


def test_random_is_repeated_by_a_generator():
    one, two, three = (cases.mlp() for _ in range(3))
    for model, seed in ((one, 1), (two, 1), (three, 2)):
        fp.global_prune(model, "random", 0.5, generator=torch.Generator().manual_seed(seed))
    assert all(torch.equal(mask, masks(two)[name]) for name, mask in masks(one).items())
    assert any(not torch.equal(mask, masks(three)[name]) for name, mask in masks(one).items())


def test_random_prunes_in_a_row_are_others_and_repeat_with_torchs_seed():
    """Of a baseline that is drawn five times, five masks."""
    found = []
    for seed in (0, None, 0):
        if seed is not None:
            torch.manual_seed(seed)
        model = cases.mlp()
        fp.global_prune(model, "random", 0.5)
        found.append(masks(model)["0.weight"])
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize(
    "words",
    [
        {},
        {"scope": "layer"},
        {"allocation": "erk"},
        {"allocation": {"0.weight": 0.4}},
        {"granularity": "channel", "cost": "parameters", "example_inputs": torch.ones(2, 4, dtype=torch.float64)},
    ],
    ids=str,
)
def test_sparsities_listed_are_the_rounds(words):
    """As one call a round, and as a pruner has them."""
    listed, called, trained = cases.mlp(), cases.mlp(), cases.mlp()
    report = fp.global_prune(listed, "magnitude", schedule=[0.2, 0.3, 0.5], **words)
    own = words.get("allocation")
    pruner = fp.Pruner(trained, "magnitude", schedule=[0.2, 0.3, 0.5], **words)
    for sparsity in (0.2, 0.3, 0.5):
        pruner.step()
        if not isinstance(own, dict):
            fp.global_prune(called, "magnitude", sparsity, **words)
    assert report.sparsity == pruner_sparsity(trained, words)
    others = [trained] if isinstance(own, dict) else [trained, called]
    for other in others:
        assert all(torch.equal(mask, masks(other)[name]) for name, mask in masks(listed).items())


def pruner_sparsity(model, words):
    keep = ("granularity", "example_inputs")
    return fp.report(model, **{word: value for word, value in words.items() if word in keep}).sparsity


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ({"schedule": [0.5, 0.3]}, "should be rising sparsities, one a round"),
        ({"schedule": []}, "should be rising sparsities, one a round"),
        ({"schedule": [0.2, 0.5], "sparsity": 0.6}, "the last of them sparsity= where that is given"),
        ({"schedule": [0.2, 0.5], "rounds": 3}, "one a round"),
        ({"schedule": [0.2, 0.5], "rounds": 1}, "one a round"),
        ({"schedule": [0.2, 0.5], "amount": 3}, "without amount="),
        ({"schedule": [20, 50]}, "schedule=20 should be from 0.0 to 1.0|=20 should be from 0.0"),
    ],
    ids=str,
)
def test_sparsities_listed_that_are_no_schedule(words, text):
    model = cases.mlp()
    with pytest.raises(ValueError, match=text):
        fp.global_prune(model, "magnitude", **words)
    assert not fp.masks(model)


def test_threads_do_not_matter():
    batches, found = CASES["cnn"].batches((8, 8)), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            model = cases.cnn()
            fp.global_prune(model, "magnitude", 0.5, data=batches)
            found.append(masks(model))
        finally:
            torch.set_num_threads(1)
    assert all(torch.equal(mask, found[1][name]) for name, mask in found[0].items())


@QUIET
def test_the_masks_hold_through_training():
    model, (x, y) = cases.cnn().train(), CASES["cnn"].batch(8)
    fp.global_prune(model, "grasp", 0.5, data=[(x, y)])
    before = masks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    for target in prunable(model):
        module, attribute = target.owners[0]
        assert torch.equal(getattr(module, attribute) == 0, ~before[target.name])


def test_hooks_that_a_first_run_puts_on_are_on_once() -> None:
    """As transformers' models do to capture what layers give: a run on a sample leaves neither hooks nor the note."""

    class Captures(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not hasattr(self, "installed"):
                self.installed, self.seen = True, []
                self[0].register_forward_hook(lambda module, args, output: self.seen.append(output))
            return super().forward(x)

    model = Captures(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    fp.global_prune(model, "magnitude", 0.5, granularity="channel", example_inputs=torch.randn(2, 3))
    assert not model[0]._forward_hooks
    model(torch.randn(2, 3))
    assert len(model.seen) == len(model[0]._forward_hooks) == 1

"""Scores that are computed where they are read.

The same selection as from scores at hand, whatever the parts they are read in.
"""

import itertools
import math

import oracles
import pytest
import torch
from cases import CASES
from torch import nn
from torch.nn.functional import pad

import torch_flowprune as fp
from torch_flowprune.scoring.candidates import parameter_candidates
from torch_flowprune.scoring.evaluation import on_access
from torch_flowprune.scoring.measures import MEASURES, magnitude
from torch_flowprune.scoring.stacked import stacked_scores as stacking
from torch_flowprune.scoring.stacked.stacked_scores import WORD, Computed, stacks
from torch_flowprune.scoring.unit_scores import Scores
from torch_flowprune.selection.ranking import sampled_bracket
from torch_flowprune.selection.ranking.lowest_k import lowest

CASE = CASES["residual"]


def computed(values, name="layer", measure=lambda theta: theta.squeeze(-1)):
    """Scores at hand, as if a measure computed them."""
    return Computed(name, "own", measure, ("theta",), lambda _: values.reshape(-1, 1))


@pytest.fixture(params=[8, 24, 1 << 20], ids=["parts of 8", "parts of 24", "whole"])
def _parts(request, monkeypatch):
    """Parts that begin and end within layers, and the sample of a large model."""
    monkeypatch.setattr(stacking, "part_size", lambda units: request.param)
    monkeypatch.setattr(sampled_bracket, "_SMALLEST_SAMPLE", 16)


@pytest.mark.usefixtures("_parts")
@pytest.mark.parametrize("alive", [False, True], ids=["all alive", "some gone"])
@pytest.mark.parametrize("k", [0, 1, 50, 113, 200])
def test_computed_scores_are_cut_as_stored_ones(k, alive):
    source = torch.Generator().manual_seed(k)
    scores = [torch.randn(n, generator=source).round(decimals=1) for n in (3, 64, 1, 0, 97, 250)]
    left = [torch.rand(len(s), generator=source) < 0.7 for s in scores] if alive else None
    shared = lambda theta: theta.squeeze(-1)
    found = lowest([computed(s, measure=shared) for s in scores], k, left)
    assert [keep.tolist() for keep in found.keep] == [keep.tolist() for keep in oracles.lowest(scores, k, left)]
    assert found.kept == [int(keep.sum()) for keep in found.keep]
    assert found.threshold == lowest(scores, k, left).threshold
    assert found.tied == lowest(scores, k, left).tied


TIED = {
    "all alike": lambda n: torch.full((n,), 0.5),
    "two values": lambda n: (torch.arange(n) % 3 == 0).float(),
    "mostly one": lambda n: torch.where(torch.arange(n) % 7 == 3, torch.arange(n) - 20.0, 0.5),
    "half precision": lambda n: (torch.arange(n) % 2).bfloat16(),
    "whole numbers that float32 cannot hold": lambda n: 16777216 + torch.arange(n) % 2,
}


@pytest.mark.usefixtures("_parts")
@pytest.mark.parametrize("name", TIED)
@pytest.mark.parametrize("alive", [False, True], ids=["all alive", "some gone"])
def test_ties_over_several_parts_and_layers_go_in_model_order(name, alive):
    """Whatever the sample says of where the k-th lies, which is little: for every k."""
    scores = [part.clone() for part in TIED[name](90).split([13, 1, 40, 36])]
    left = list((torch.rand(90) < 0.7).split([13, 1, 40, 36])) if alive else None
    flat, candidates = torch.cat(scores).double(), torch.cat(left) if alive else torch.ones(90).bool()
    for k in range(int(candidates.sum()) + 1):
        found = lowest(scores, k, left)
        keep = torch.cat(found.keep)
        assert keep.tolist() == torch.cat(oracles.lowest(scores, k, left)).tolist(), k
        gone = flat[candidates & ~keep]
        assert found.threshold == (gone.max().item() if k else None), k
        assert found.tied == (int((flat[keep] == found.threshold).sum()) if k else 0), k


@pytest.mark.usefixtures("_parts")
def test_each_layer_has_flags_in_memory_of_its_own():
    scores = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (30, 17, 64)]
    for k in (0, 1, 60, 111):
        keeps = lowest(scores, k).keep
        assert len({keep.untyped_storage().data_ptr() for keep in keeps}) == len(keeps)
        assert [keep.untyped_storage().nbytes() for keep in keeps] == [30, 17, 64]


def test_a_part_knows_no_layer_borders():
    laid = [torch.arange(float(n)) + 100 * i for i, n in enumerate((5, 0, 7, 1, 20))]
    flat = torch.cat(laid)
    (stack,) = stacks(laid, [None] * 5)
    for start, stop, step in itertools.product(range(0, 33, 4), range(0, 34, 3), (1, 2, 7, 40)):
        if start < stop <= 33:
            assert stack.scores(start, stop, step).tolist() == flat[start:stop:step].tolist(), (start, stop, step)


UNITS = (1, 7, 8, 65_408, 3_000_001, 12_345_678, 100_000_000, 268_000_000, 10**9)


@pytest.mark.parametrize("units", UNITS)
def test_a_part_is_a_32nd_of_the_model_within_bounds(units):
    """Of whole words: the scores of any other part would be copied to be filled up to one."""
    found = stacking.part_size(units)
    assert found % WORD == 0
    assert 65_408 <= found < 2**23
    assert found in {65_408, 2**23 - 2**14} or units / 32 - WORD < found <= units / 32


@pytest.mark.parametrize("sizes", [(3_000_001,), (5, 2_999_996), (1_000_001, 2_000_002)])
def test_only_the_last_part_of_a_stack_has_to_be_filled_up(sizes, monkeypatch):
    filled = []

    def noted(scores, *args, **options):
        filled.append(len(scores))
        return pad(scores, *args, **options)

    monkeypatch.setattr(stacking, "pad", noted)
    laid = stacks([torch.zeros(1).expand(n) for n in sizes], [None] * len(sizes))
    parts = stacking.parts_of(laid)
    assert len(parts) > 32
    for i, start, stop in parts:
        laid[i].words(laid[i].scores(start, stop), torch.float32)
    assert filled == [parts[-1][2] - parts[-1][1]]


def test_only_layers_whose_units_are_alike_are_stacked():
    """One measure over rows of another length, dtype or kind cannot read them as one."""
    wide = Computed("wide", "own", torch.sum, ("theta",), lambda _: torch.zeros(3, 4))
    narrow = [Computed(name, "own", torch.sum, ("theta",), lambda _: torch.zeros(3, 2)) for name in "ab"]
    other = Computed("other", "own", torch.mean, ("theta",), lambda _: torch.zeros(3, 2))
    double = Computed("double", "own", torch.mean, ("theta",), lambda _: torch.zeros(3, 2, dtype=torch.float64))
    laid = stacks([wide, *narrow, other, double, torch.zeros(3)], [None] * 6)
    assert [[layer.name for layer in stack.layers] for stack in laid] == [
        ["wide"],
        ["a", "b"],
        ["other"],
        ["double"],
        [""],
    ]


def test_scores_on_access_are_the_stored_ones(monkeypatch):
    """Every measure and granularity, on a net of several layers, read in parts that are smaller than a layer."""
    monkeypatch.setattr(stacking, "part_size", lambda units: 8)
    for name, granularity in itertools.product(MEASURES, ("weight", "filter")):
        model = CASE.model()
        given = {
            "data": CASE.batches((4, 3)),
            "theta0": CASE.model(seed=9).state_dict(),
            "example_inputs": CASE.batch(4)[0],
        }
        stored = fp.scores(model, name, granularity=granularity, generator=torch.Generator().manual_seed(1), **given)
        by_scores, by_measure = CASE.model(), CASE.model()
        fp.global_prune(by_scores, sparsity=0.4, scores=stored, min_keep=1)
        fp.global_prune(
            by_measure,
            name,
            0.4,
            min_keep=1,
            granularity=granularity,
            generator=torch.Generator().manual_seed(1),
            **given,
        )
        for key, mask in fp.masks(by_scores).items():
            assert torch.equal(mask, fp.masks(by_measure)[key]), (name, granularity, key)


def test_a_measure_of_your_own_is_given_whole_layers(monkeypatch):
    """It may look at all units of a layer, as a normalised magnitude does."""
    monkeypatch.setattr(stacking, "part_size", lambda units: 8)
    seen = []

    def normalised(theta):
        seen.append(len(theta))
        return theta.abs().sum(-1) / theta.norm()

    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    fp.global_prune(model, normalised, 0.5)
    assert seen == [35, 21]


def test_what_is_on_access_is_read_like_any_scores():
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    point = fp.flow(model, needs=())
    lazy = on_access(point, magnitude, parameter_candidates(model, "weight"), "weight")
    assert isinstance(lazy, Scores)
    assert all(isinstance(value, Computed) for value in map(lazy.stored, lazy))
    for name, value in fp.scores(model).items():
        assert torch.equal(lazy[name], value)
    assert str(lazy) == str(fp.scores(model))


@pytest.mark.usefixtures("_parts")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_score_that_is_not_finite_is_refused_before_anything_is_touched(value):
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 3))
    model[2].weight.data[4, 3] = value
    with pytest.raises(
        ValueError, match=r"the magnitude scores of 2.weight are not all finite: .* try model.double\(\)"
    ):
        fp.global_prune(model, "magnitude", 0.5)
    assert not fp.masks(model)
    assert list(model.state_dict()) == [f"{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")]


@pytest.mark.parametrize(
    "options",
    [
        {"granularity": "filter"},
        {"normalize": "max"},
        {"allocation": "lamp"},
        {"allocation": "row"},
        {"granularity": "channel", "cost": "flops", "normalize": None, "example_inputs": torch.ones(2, 5)},
    ],
    ids=["over the mean", "over the maximum", "lamp", "rows", "a budget"],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_stored_to_be_ranked_have_to_be_finite_too(value, options):
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 3))
    model[2].weight.data[4, 3] = value
    with pytest.raises(ValueError, match=r"the magnitude scores of 2.weight are not all finite"):
        fp.global_prune(model, "magnitude", 0.5, **options)
    assert not fp.masks(model)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_of_blocks_have_to_be_finite_too(value):
    layer = nn.Linear(8, 4)
    layer.weight.data[0, 0] = value
    with pytest.raises(ValueError, match=r"the magnitude scores of weight are not all finite"):
        fp.global_prune(layer, "magnitude", granularity="2:4")
    assert not fp.masks(layer)


def test_finite_scores_whose_sum_overflows_are_ranked():
    model = nn.Linear(4, 4)
    nn.init.constant_(model.weight, 3e38)
    model.weight.data[0, :2] = 1
    assert fp.global_prune(model, "magnitude", 0.125).threshold == 1


def test_a_nan_among_scores_at_hand_ends_in_an_error_where_it_is_met():
    """Their giver has to look for it; it must not be looked for in ever wider brackets."""
    with pytest.raises(ValueError, match="hold nan: they cannot be ranked"):
        lowest([torch.tensor([1.0, math.nan, 2.0])], 1)


def test_a_prune_stores_nothing_of_the_models_size(monkeypatch):
    """Of every measure of ours: no result of the measure is as long as the model."""
    monkeypatch.setattr(stacking, "part_size", lambda units: 64)
    longest = 0
    model = nn.Sequential(nn.Linear(40, 50), nn.ReLU(), nn.Linear(50, 30))
    scores = stacking.Stack.scores

    def noted(self, start, stop, step=1):
        nonlocal longest
        found = scores(self, start, stop, step)
        longest = max(longest, len(found))
        return found

    monkeypatch.setattr(stacking.Stack, "scores", noted)
    monkeypatch.setattr(sampled_bracket, "_SMALLEST_SAMPLE", 16)
    fp.global_prune(model, "magnitude", 0.9)
    assert 64 <= longest < 3500 / 4


def test_masks_that_fit_are_not_copied_and_those_of_a_user_are():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    masks = {name: torch.rand(model.get_parameter(name).shape) < 0.5 for name in ("0.weight", "1.weight")}
    fp.apply_masks(model, masks)
    assert all(model.get_submodule(name[0]).weight_mask is not mask for name, mask in masks.items())
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    whole = torch.rand(4, 3) < 0.5
    fp.apply_masks(model, {"0.weight": masks["0.weight"], "1.weight": whole[:2]}, copy=False)
    assert model[0].weight_mask.data_ptr() == masks["0.weight"].data_ptr()
    assert model[1].weight_mask.untyped_storage().nbytes() == 6  # a view of more than itself is copied
    conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    fp.global_prune(conv, "magnitude", 0.5)
    assert conv.weight_mask.stride() == conv.weight_orig.stride()

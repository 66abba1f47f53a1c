"""Rows 6 of docs/host.md: amounts, scores, ties, dtypes. What the core tests cover already is only named in the table."""

from __future__ import annotations

import decimal
import fractions
import math

import numpy as np
import pytest
import torch
from hosts import assert_in_force, hooks_of, mlp, output, pruned, snapshot, train
from torch import nn
from torch.nn.utils import prune

import torch_flowprune as fp

X = torch.linspace(-1, 1, 24).view(3, 8)


def square(size=4):
    return nn.Linear(size, size, bias=False)


def gone(layer):
    return int((layer.weight == 0).sum())


@pytest.mark.parametrize(
    ("amount", "expected"),
    [
        (0, 0),
        (0.0, 0),
        (1, 1),
        (1.0, 16),
        (16, 16),
        (0.5, 8),
        (np.float32(0.5), 8),
        (np.float64(0.5), 8),
        (np.int64(3), 3),
        (fractions.Fraction(1, 4), 4),
    ],
)
@pytest.mark.filterwarnings("ignore:nothing is left of weight")
def test_row_6_0_amounts(amount, expected):
    local, whole = square(), square()
    fp.l1_unstructured(local, "weight", amount)
    fp.global_prune(whole, "l1", amount=amount)
    assert (gone(local), gone(whole)) == (expected, expected)


@pytest.mark.parametrize(
    ("amount", "error", "text"),
    [
        (17, ValueError, r"amount=17 units should go: expected 0 to 16, the number of units left to prune"),
        (-1, ValueError, "expected 0 to "),
        (-0.1, ValueError, r"amount=-0.1 should be from 0.0 to 1.0"),
        (1.1, ValueError, "should be from 0.0 to 1.0"),
        (50.0, ValueError, "for 50.0 percent write 0.5"),
        (math.inf, ValueError, "should be from 0.0 to 1.0"),
        (math.nan, ValueError, "should be from 0.0 to 1.0"),
        (True, TypeError, r"a fraction of what is left \(float\) or a number of units \(int\), got True"),
        (False, TypeError, "got False"),
        ("0.5", TypeError, "got '0.5'"),
        (np.bool_(True), TypeError, "got "),
        (torch.tensor(0.5), TypeError, r"got tensor\(0.5000\)"),
        (np.array(0.5), TypeError, r"got array\(0.5\)"),
        (decimal.Decimal("0.5"), TypeError, "got Decimal"),
    ],
)
def test_row_6_0_bad_amounts(amount, error, text):
    layer = square()
    before = snapshot(layer)
    for attempt in (
        lambda: fp.l1_unstructured(layer, "weight", amount),
        lambda: fp.random_structured(layer, "weight", amount) if amount != 17 else fp.l1_unstructured(layer, "weight", amount),
        lambda: fp.global_prune(layer, amount=amount),
    ):
        with pytest.raises(error, match=text):
            attempt()
        assert snapshot(layer) == before


def test_row_6_0_no_amount():
    layer = square()
    with pytest.raises(TypeError, match="got None"):
        fp.l1_unstructured(layer, "weight", None)
    with pytest.raises(ValueError, match="give sparsity= .* or amount="):
        fp.global_prune(layer)


def test_row_6_0_rounding_is_of_the_whole():
    small = nn.Sequential(*[nn.Linear(3, 1, bias=False) for _ in range(10)])
    assert fp.global_prune(small, amount=0.1).pruned == 3
    layer = nn.Linear(5, 1, bias=False)
    fp.l1_unstructured(layer, "weight", 0.1)
    assert gone(layer) == 0, "half to even, as torch rounds"


def test_row_6_1_a_float_amount_is_of_what_is_left_and_sparsity_of_all():
    of_left, of_all = square(10), square(10)
    found = []
    for total in (0.2, 0.4, 0.6):
        fp.l1_unstructured(of_left, "weight", 0.2)
        fp.global_prune(of_all, sparsity=total)
        found.append((gone(of_left), gone(of_all)))
    assert found == [(20, 20), (36, 40), (49, 60)]


def test_row_6_2_more_than_is_left_on_a_later_round():
    layer = pruned(square(), sparsity=0.5)
    before = snapshot(layer)
    for attempt in (
        lambda: fp.l1_unstructured(layer, "weight", 9),
        lambda: fp.global_prune(layer, amount=9),
        lambda: fp.random_structured(layer, "weight", 5),
    ):
        with pytest.raises(ValueError, match="units left to prune"):
            attempt()
        assert snapshot(layer) == before


class Failing(prune.BasePruningMethod):
    PRUNING_TYPE = "unstructured"

    def compute_mask(self, t, default_mask):
        raise RuntimeError("no mask today")


@pytest.mark.parametrize(
    "fail",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", 100),
        lambda layer: prune.l1_unstructured(layer, "weight", -1),
        lambda layer: Failing.apply(layer, "weight"),
    ],
)
def test_row_6_2_after_a_failing_function_of_torch_the_mask_is_in_force_and_can_be_removed(fail):
    for after in (lambda layer: fp.remove(layer), lambda layer: fp.global_prune(layer, sparsity=0.5) and prune.remove(layer, "weight")):
        layer = pruned(nn.Linear(8, 8), sparsity=0.25)
        with pytest.raises((ValueError, RuntimeError)):
            fail(layer)
        assert not prune.is_pruned(layer), "torch deletes its hook before it validates"
        train(layer, X)
        assert_in_force(layer, lambda: layer(X))  # noqa: B023 - called at once
        after(layer)
        assert list(layer._parameters) == ["weight", "bias"]
        assert gone(layer) >= 16
        assert not hooks_of(layer)


def test_row_6_3_hooks_hold_no_masks():
    layer = square()
    for _ in range(5):
        fp.global_prune(layer, amount=0.1)
        fp.l1_unstructured(layer, "weight", 0.1)
    prune.custom_from_mask(layer, "weight", torch.ones(4, 4))
    (hook,) = hooks_of(layer)
    held = [value for method in (hook, *hook) for value in vars(method).values() if isinstance(value, torch.Tensor)]
    assert all(value is layer.weight_mask for value in held)
    assert layer.weight_mask.dtype is torch.bool


@pytest.mark.parametrize("kind", ["unstructured", "structured", "global"])
def test_row_6_4_methods_of_a_user_on_top(kind):
    class Method(prune.BasePruningMethod):
        PRUNING_TYPE = kind
        dim = 0

        def compute_mask(self, t, default_mask):
            mask = torch.ones_like(default_mask)
            mask.view(-1)[0] = 0
            return mask

    layer = pruned(square(), sparsity=0.25)
    before = layer.weight_mask
    Method.apply(layer, "weight")
    assert not (layer.weight_mask & ~before).any(), "nothing revives, whatever the type"


def test_row_6_4_every_class_has_a_type():
    for name in fp.__all__:
        kind = getattr(fp, name)
        if isinstance(kind, type) and issubclass(kind, prune.BasePruningMethod):
            assert ("structured" if name.endswith("Structured") else "unstructured") == kind.PRUNING_TYPE


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_row_6_5_scores_that_are_not_finite_are_refused(value):
    layer = square()
    with torch.no_grad():
        layer.weight[0, 0] = value
    before = snapshot(layer)
    for attempt in (lambda: fp.l1_unstructured(layer, "weight", 0.5), lambda: fp.global_prune(layer, sparsity=0.5)):
        with pytest.raises(ValueError, match="not all finite"):
            attempt()
        assert snapshot(layer) == before
    with pytest.raises(ValueError, match="hold nan"):
        fp.l1_unstructured(layer, "weight", 0.5, importance_scores=torch.full((4, 4), math.nan))


def test_row_6_5_what_is_pruned_is_zero_even_where_the_parameter_is_not_finite():
    layer = pruned(nn.Linear(8, 8))
    assert_in_force(layer, lambda: layer(X))
    with torch.no_grad():
        layer.weight_orig[~layer.weight_mask] = math.inf
    assert not layer.weight[~layer.weight_mask].any()
    assert not torch.signbit(layer.weight[~layer.weight_mask]).any(), "not -0.0 either"
    assert fp.remove(layer).weight.isfinite().all()


def test_row_6_6_scores_are_signed():
    layer = square()
    scores = torch.arange(16.0).view(4, 4) - 8
    fp.loss_preservation_unstructured(layer, "weight", 4, importance_scores=scores)
    assert torch.equal(layer.weight_mask, scores >= -4)
    chosen = square()
    fp.random_unstructured(chosen, "weight", 4, importance_scores=scores)
    assert torch.equal(chosen.weight_mask, scores >= -4), "given scores are used by every method"


@pytest.mark.parametrize(
    ("scores", "error", "text"),
    [
        ({"nowhere.weight": torch.ones(4, 4)}, ValueError, "parameters this model does not have: nowhere.weight"),
        ({"0.weight": torch.ones(64)}, ValueError, r"no entry for '2.weight'"),
        ({"0.weight": torch.ones(8, 8), "2.weight": torch.ones(8, 4)}, ValueError, r"shape \(8, 4\): expected one a unit, \(32,\)"),
        ({"0.weight": torch.ones(8, 8, dtype=torch.bool), "2.weight": torch.ones(4, 8)}, ValueError, "should be numbers with values, got torch.bool"),
        ({"0.weight": torch.ones(8, 8, device="meta"), "2.weight": torch.ones(4, 8)}, ValueError, "should be numbers with values"),
    ],
)
def test_row_6_7_given_scores_are_checked(scores, error, text):
    model = mlp()
    before = snapshot(model)
    with pytest.raises(error, match=text):
        fp.global_prune(model, scores=scores, sparsity=0.5, include=["0", "2"] if "no entry" in text else None)
    assert snapshot(model) == before
    with pytest.raises(ValueError, match=r"should have shape \(4, 8\) or \(32,\), got \(8, 4\)"):
        fp.l1_unstructured(model[2], "weight", 1, importance_scores=torch.ones(8, 4))


def test_row_6_8_pairs_from_a_generator_and_none_at_all():
    model = mlp()
    report = fp.global_prune(model, sparsity=0.5, parameters=((module, "weight") for module in model if hasattr(module, "weight")))
    assert report.units == 96
    with pytest.raises(ValueError, match="parameters= is empty"):
        fp.global_prune(model, sparsity=0.6, parameters=[])


def test_row_6_9_parameters_instead_of_pairs():
    model = mlp()
    with pytest.raises(TypeError, match=r"takes \(module, name\) pairs .*, got a tensor; to prune all of a model leave it out"):
        fp.global_prune(model, sparsity=0.5, parameters=model.parameters())
    with pytest.raises(TypeError, match="expected a torch.nn.Module, got generator"):
        fp.global_prune(model.parameters(), sparsity=0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_row_6_10_half_precision(dtype):
    layer = nn.Linear(64, 64, bias=False).to(dtype)
    fp.global_prune(layer, sparsity=0.5)
    assert layer.weight_mask.dtype is torch.bool
    assert layer.weight.dtype is dtype
    assert layer.weight_mask.sum() == 2048, "exactly k, among many ties"
    with torch.no_grad():
        layer.weight_orig.fill_(1e-4)
    layer.weight_orig.grad = torch.full_like(layer.weight_orig, 1e-5)
    assert (layer.weight_orig * layer.weight_orig.grad == 0).all() or dtype is torch.bfloat16
    scores = fp.LossPreservationUnstructured(1)._own_scores(next(iter(fp.targets.parameters_of(layer).values())))
    assert scores.dtype is torch.float32
    assert scores[layer.weight_mask.flatten()].all(), "1e-9 is a score like any other"


def test_row_6_11_ties_go_in_model_order():
    layer = square(10)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    with pytest.warns(fp.TiedScoresWarning, match="model order decided"):
        fp.global_prune(layer, sparsity=0.5)
    assert torch.equal(layer.weight_mask.flatten(), torch.arange(100) >= 50)
    exact = nn.Sequential(*[square(10) for _ in range(10)])
    with torch.no_grad():
        for parameter in exact.parameters():
            parameter.copy_(torch.arange(100).view(10, 10) % 3)
    with pytest.warns(fp.TiedScoresWarning):
        assert fp.global_prune(exact, sparsity=0.5).pruned == 500


def test_row_6_12_layer_collapse():
    model = nn.Sequential(square(8), square(8))
    with torch.no_grad():
        model[1].weight.mul_(1e-6)
    with pytest.warns(fp.LayerCollapseWarning, match="nothing is left of 1.weight.*min_keep="):
        fp.global_prune(model, sparsity=0.5)
    model = nn.Sequential(square(8), square(8))
    with torch.no_grad():
        model[1].weight.mul_(1e-6)
    fp.global_prune(model, sparsity=0.5, min_keep=3)
    assert model[1].weight_mask.sum() == 3


CONV = {
    "global": lambda model: fp.global_prune(model, sparsity=0.5),
    "filters": lambda model: fp.global_prune(model, sparsity=0.5, granularity="filter"),
    "unstructured": lambda model: fp.l1_unstructured(model[0], "weight", 0.5),
    "random": lambda model: fp.random_unstructured(model[0], "weight", 0.5),
    "structured": lambda model: fp.magnitude_structured(model[0], "weight", 0.5, dim=1),
}


@pytest.mark.parametrize("case", CONV)
def test_row_6_13_channels_last(case):
    model = nn.Sequential(nn.Conv2d(4, 4, 3))
    twin = nn.Sequential(nn.Conv2d(4, 4, 3))
    twin.load_state_dict(model.state_dict())
    last = torch.channels_last
    model.to(memory_format=last)
    torch.manual_seed(0)
    CONV[case](model)
    torch.manual_seed(0)
    CONV[case](twin)
    assert torch.equal(model[0].weight_mask, twin[0].weight_mask)
    for tensor in (model[0].weight, model[0].weight_orig, model[0].weight_mask):
        assert tensor.is_contiguous(memory_format=last)
    twin.to(memory_format=last)
    assert twin[0].weight.is_contiguous(memory_format=last)
    images = torch.randn(2, 4, 5, 5).to(memory_format=last)
    train(model, images)
    assert_in_force(model, lambda: output(model, images))


def test_row_6_13_a_transposed_weight():
    layer = nn.Linear(4, 3)
    layer.weight = nn.Parameter(torch.randn(4, 3).t())
    values = layer.weight.detach().clone()
    fp.l1_unstructured(layer, "weight", 6)
    assert values[~layer.weight_mask].abs().max() <= values[layer.weight_mask].abs().min()


@pytest.mark.parametrize(
    ("dim", "error", "text"),
    [
        (2, ValueError, "dim=2 is not an axis"),
        (-3, ValueError, "dim=-3 is not an axis"),
        (5, ValueError, "dim=5"),
        (0.0, TypeError, "dim should be an int"),
        (None, TypeError, "dim should be an int"),
        (True, TypeError, "dim should be"),
    ],
)
def test_row_6_14_bad_axes(dim, error, text):
    layer = nn.Linear(4, 3)
    before = snapshot(layer)
    with pytest.raises(error, match=text):
        fp.magnitude_structured(layer, "weight", 1, dim=dim)
    assert snapshot(layer) == before


def test_row_6_14_axes():
    for dim in (0, 1, -1, -2):
        layer = nn.Linear(4, 3)
        fp.magnitude_structured(layer, "weight", 1, dim=dim)
        assert (~layer.weight_mask).all(dim=1 - dim % 2).sum() == 1
    default = nn.Linear(4, 3)
    fp.MagnitudeStructured.apply(default, "weight", 1)
    assert (~default.weight_mask).all(dim=1).sum() == 1, "outputs, where torch's classes take the last axis"
    vector = nn.Linear(4, 3)
    fp.magnitude_structured(vector, "bias", 1)
    assert vector.bias_mask.sum() == 2


def test_row_6_15_there_are_no_matrix_norms():
    with pytest.raises(TypeError, match="unexpected keyword argument 'n'"):
        fp.magnitude_structured(square(), "weight", 1, n="nuc")


def test_row_6_16_random_takes_a_generator():
    def mask(prune_it, seed):
        layer = square(8)
        prune_it(layer, torch.Generator().manual_seed(seed))
        return layer.weight_mask

    for prune_it in (
        lambda layer, source: fp.random_unstructured(layer, "weight", 0.5, generator=source),
        lambda layer, source: fp.random_structured(layer, "weight", 0.5, generator=source),
        lambda layer, source: fp.global_prune(layer, "random", sparsity=0.5, generator=source),
    ):
        state = torch.get_rng_state()
        assert torch.equal(mask(prune_it, 0), mask(prune_it, 0))
        assert not torch.equal(mask(prune_it, 0), mask(prune_it, 1))
        torch.set_rng_state(state)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_row_6_17_zero_sized():
    model = nn.Sequential(nn.Linear(0, 4), nn.Linear(4, 4))
    assert fp.global_prune(model, sparsity=0.5).pruned == 8
    model(torch.ones(2, 0)).sum().backward()
    fp.l1_unstructured(nn.Linear(0, 4), "weight", 0.5)
    with pytest.raises(ValueError, match="expected 0 to 0"):
        fp.l1_unstructured(nn.Linear(0, 4), "weight", 1)


def test_row_6_18_meta():
    model = nn.Sequential(square(), square().to("meta"))
    before = snapshot(model)
    for attempt in (lambda: fp.l1_unstructured(model[1], "weight", 0.5), lambda: fp.global_prune(model, sparsity=0.5)):
        with pytest.raises(ValueError, match="on the meta device and has no values: load or initialise the model first"):
            attempt()
        assert snapshot(model) == before
    assert fp.global_prune(model, sparsity=0.5, include="0.weight").pruned == 8


def test_row_6_19_masks_of_a_user():
    layer = square()
    values = layer.weight.detach().clone()
    with pytest.raises(ValueError, match=r"should be bool \(True = kept\), got torch.float32: use mask != 0"):
        fp.apply_masks(layer, {"weight": torch.full((4, 4), 0.5)})
    fp.apply_masks(layer, {"weight": torch.eye(4, dtype=torch.bool)})
    prune.custom_from_mask(layer, "weight", torch.full((4, 4), 0.5))
    assert torch.equal(layer.weight, values * torch.eye(4)), "a mask that is bool cannot scale: what is not 0 is kept"
    fp.apply_masks(layer, {"weight": torch.ones(4, 4, dtype=torch.bool)})
    assert layer.weight_mask.sum() == 4, "what is pruned stays pruned"
    dense = {"weight": layer.weight_orig.detach().clone()}
    assert torch.equal(fp.load_state_dict(square(), dense).weight, values), "undo: weight_orig still has every value"


def test_row_6_19_a_mask_of_torch_that_scales():
    layer = square()
    prune.custom_from_mask(layer, "weight", torch.full((4, 4), 0.5))
    before = snapshot(layer)
    for attempt in (lambda: fp.l1_unstructured(layer, "weight", 0.5), lambda: fp.global_prune(layer, sparsity=0.5)):
        with pytest.raises(ValueError, match="other values than 0 and 1, so it scales weights: prune.remove it first"):
            attempt()
        assert snapshot(layer) == before


def test_row_6_20_frozen_parameters_are_pruned_and_stay_frozen():
    model = mlp()
    model[0].requires_grad_(False)
    report = fp.global_prune(model, "loss_preservation", sparsity=0.5, data=(X, torch.tensor([0, 1, 2])))
    assert report.units == 96
    assert [parameter.requires_grad for parameter in model.parameters()] == [False, False, True, True]
    if "0.weight" in fp.masks(model):
        assert not model[0].weight.requires_grad

"""Rows 6.0 to 6.9 of docs/explanation/host.md: amounts, rounds, given scores."""

from __future__ import annotations

import decimal
import fractions
import math

import numpy as np
import pytest
import torch
from hosts import assert_in_force, hooks_of, mlp, pruned, snapshot, train
from torch import nn
from torch.nn.utils import prune

import torch_flowprune as fp

ROWS = {
    "6.0": (
        "`True`, nan, 16 of 16: errors from inside, or wrong ones",
        "refused",
        (
            "numbers that are `numbers.Real` are accepted, bools and 0-d tensors are not. An amount out of range "
            "is an error that names the range. Rounding is half to even, over the whole pool"
        ),
    ),
    "6.1": (
        "a float amount is of what remains: 0.2 three times is 0.49",
        "handled",
        "`amount` has torch's meaning. `sparsity` is the fraction of everything, after the call",
    ),
    "6.2": (
        "more than is left on a later round: the module is broken",
        "handled",
        (
            "this package's calls change nothing. torch's own functions delete their hook before they validate. "
            "Where the new method refuses what is left, this package's hook puts itself back, except in an "
            "unpickled copy. Where its constructor refuses (`amount=-1`), the mask stays in force without its "
            "hook, so `prune.is_pruned` says no. torch's next prune is then an error that says how to restore it: "
            "`fp.remove` and every prune of this package do"
        ),
    ),
    "6.3": (
        "every old mask is kept in the hook",
        "handled",
        "hooks hold no mask but the module's",
    ),
    "6.4": (
        "user methods: types that crash on round 2 or revive weights",
        "handled",
        "no pruned weight comes back, whatever `PRUNING_TYPE` says",
    ),
    "6.5": (
        "nan is pruned last; a pruned nan or inf stays nan",
        "refused",
        (
            "scores that are not finite are refused (an infinity in `scores=` protects a unit, or condemns it). A "
            "pruned weight is exactly 0, whatever lies under the mask"
        ),
    ),
    "6.6": (
        "`L1Unstructured` takes the abs of given scores, random ones ignore them",
        "handled",
        "given scores are used as they are",
    ),
    "6.7": (
        "unknown keys, other shapes, bool or meta scores are accepted",
        "refused",
        "each is an error that names it",
    ),
    "6.8": (
        "pairs from a generator, an empty list",
        "handled",
        "a generator works; an empty list is an error that says so",
    ),
    "6.9": (
        "`model.parameters()` for pairs: an error about attribute names",
        "refused",
        "pass the model",
    ),
}

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
        (torch.tensor(0.5), 8),
        (np.array(0.5), 8),
        (torch.tensor(3), 3),
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
        (17, ValueError, r"amount=17 units should be pruned: expected 0 to 16, the number of units left to prune"),
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
        (torch.tensor([0.5, 0.5]), TypeError, r"got tensor\("),
        (np.array([0.5, 0.5]), TypeError, r"got array\("),
        (decimal.Decimal("0.5"), TypeError, "got Decimal"),
    ],
)
def test_row_6_0_bad_amounts(amount, error, text):
    layer = square()
    before = snapshot(layer)
    for attempt in (
        lambda: fp.l1_unstructured(layer, "weight", amount),
        lambda: (
            fp.random_structured(layer, "weight", amount)
            if type(amount) is not int
            else fp.l1_unstructured(layer, "weight", amount)
        ),
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
    for after in (
        lambda layer: fp.remove(layer),
        lambda layer: fp.global_prune(layer, sparsity=0.5) and prune.remove(layer, "weight"),
    ):
        layer = pruned(nn.Linear(8, 8), sparsity=0.25)
        with pytest.raises((ValueError, RuntimeError)):
            fail(layer)
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
        (
            {"0.weight": torch.ones(8, 8), "2.weight": torch.ones(8, 4)},
            ValueError,
            r"shape \(8, 4\): expected one per unit, \(32,\)",
        ),
        (
            {"0.weight": torch.ones(8, 8, dtype=torch.bool), "2.weight": torch.ones(4, 8)},
            ValueError,
            "should be numbers with values, got torch.bool",
        ),
        (
            {"0.weight": torch.ones(8, 8, device="meta"), "2.weight": torch.ones(4, 8)},
            ValueError,
            "should be numbers with values",
        ),
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
    report = fp.global_prune(
        model, sparsity=0.5, parameters=((module, "weight") for module in model if hasattr(module, "weight"))
    )
    assert report.units == 96
    with pytest.raises(ValueError, match="parameters= is empty"):
        fp.global_prune(model, sparsity=0.6, parameters=[])


def test_row_6_9_parameters_instead_of_pairs():
    model = mlp()
    with pytest.raises(
        TypeError, match=r"takes \(module, name\) pairs .*, got a tensor; to prune all of a model leave it out"
    ):
        fp.global_prune(model, sparsity=0.5, parameters=model.parameters())
    with pytest.raises(TypeError, match="expected a torch.nn.Module, got generator"):
        fp.global_prune(model.parameters(), sparsity=0.5)

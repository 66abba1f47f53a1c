"""Rows 6.10 to 6.20 of docs/explanation/host.md: dtypes, ties, layouts, axes, randomness, masks of a user."""

from __future__ import annotations

import pytest
import torch
from hosts import assert_in_force, mlp, output, snapshot, train
from torch import nn
from torch.nn.utils import prune

import torch_flowprune as fp
from torch_flowprune.inputs.named_parameters.parameters import parameters_of

ROWS = {
    "6.10": (
        "half precision: ties, underflowing products, float masks",
        "handled",
        "scores are float32, the count is exact, masks are bool",
    ),
    "6.11": (
        "ties fall by position, from the end",
        "handled",
        (
            "the count is exact, and ties are broken in model order. `global_prune` and `Pruner` warn where order "
            "decided; the functions of one module do not. CUDA was not tested (it needs a GPU)"
        ),
    ),
    "6.12": (
        "a whole layer is pruned, in silence",
        "handled",
        (
            "`global_prune` and `Pruner` raise a `LayerCollapseWarning`; the functions of one module do not. "
            "`min_keep=` prevents it"
        ),
    ),
    "6.13": (
        "channels_last fails",
        "handled",
        "any memory layout works, and mask and weight keep it",
    ),
    "6.14": (
        "a bad `dim` is an error from inside; classes default to the inputs",
        "refused",
        "the error lists the axes. The default is 0, the outputs",
    ),
    "6.15": (
        '`n="nuc"` crashes or prunes nothing',
        "refused",
        "there is no `n`: `magnitude` and `l1` are the norms",
    ),
    "6.16": (
        "random pruning draws from the global state only",
        "handled",
        "`generator=`",
    ),
    "6.17": (
        "zero-sized tensors",
        "handled",
        "they have no units",
    ),
    "6.18": (
        'meta tensors are "pruned"',
        "refused",
        "load or initialise the weights first",
    ),
    "6.19": (
        "a mask of 0.5 scales weights; no undo",
        "documented",
        (
            "`apply_masks` takes bool masks (ones do not un-prune). A scaling mask of torch's is refused. Until "
            "`remove`, `weight_orig` has every value"
        ),
    ),
    "6.20": (
        "frozen parameters are pruned",
        "documented",
        "they are, and stay frozen. `exclude=` leaves them out",
    ),
}

X = torch.linspace(-1, 1, 24).view(3, 8)


def square(size=4):
    return nn.Linear(size, size, bias=False)


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
    scores = fp.LossPreservationUnstructured(1)._own_scores(next(iter(parameters_of(layer).values())))
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
    model = nn.Sequential(nn.Linear(0, 4), nn.Linear(4, 4))
    assert [layer.name for layer in fp.global_prune(model, "l1", 0.25, granularity="filter").layers] == ["1.weight"]
    assert fp.global_prune(model, "l1", 0.5, granularity="filter").pruned == 2


def test_row_6_18_meta():
    model = nn.Sequential(square(), square().to("meta"))
    before = snapshot(model)
    for attempt in (lambda: fp.l1_unstructured(model[1], "weight", 0.5), lambda: fp.global_prune(model, sparsity=0.5)):
        with pytest.raises(
            ValueError, match="on the meta device and has no values: load or initialise the model first"
        ):
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

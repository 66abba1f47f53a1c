"""Penalties against plain loops, and what they do to what is pruned afterwards."""

import pickle
from copy import deepcopy

import pytest
import torch
from torch import nn

import torch_flowprune as fp

X = torch.randn(16, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def net():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 3), nn.Flatten(), nn.Linear(20, 2)
    model = nn.Sequential(*layers).double()
    nn.init.uniform_(model[1].weight)
    return model


def test_the_group_lasso_is_the_sum_over_coupled_channels():
    model = net()
    coupling = fp.couple(model, X)
    first = [
        torch.cat([model[0].weight[c].flatten(), model[3].weight[:, c].flatten()]).square().sum()
        + model[0].bias[c] ** 2 + model[1].weight[c] ** 2 + model[1].bias[c] ** 2
        for c in range(8)
    ]  # fmt: skip
    second = [
        model[3].weight[c].square().sum() + model[3].bias[c] ** 2 + model[5].weight[:, 4 * c : 4 * c + 4].square().sum()
        for c in range(5)
    ]
    expected = sum((27 + 45 + 3) ** 0.5 * s.sqrt() for s in first) + sum((72 + 1 + 8) ** 0.5 * s.sqrt() for s in second)
    found = fp.regularizers.GroupLasso(coupling, strength=0.1)(model)
    assert found.item() == pytest.approx(0.1 * expected.item(), rel=1e-12)
    wanted = torch.autograd.grad(expected * 0.1, list(model.parameters()), allow_unused=True)
    for name, g, w in zip(
        dict(model.named_parameters()),
        torch.autograd.grad(found, list(model.parameters()), allow_unused=True),
        wanted,
        strict=True,
    ):
        assert (g is None) == (w is None), name
        assert g is None or torch.allclose(g, w, rtol=1e-10, atol=0), name


def test_scales_alone_and_producers_left_out():
    model = net()
    coupling = fp.couple(model, X)
    slimming = fp.regularizers.GroupLasso(coupling, 2.0, scored_by="scale", exclude="3")
    assert slimming(model).item() == pytest.approx(2 * model[1].weight.abs().sum().item())
    with pytest.raises(ValueError, match="the channels of '3.weight' have no norm"):
        fp.regularizers.GroupLasso(coupling, 2.0, scored_by="scale")(model)


def test_a_channel_of_zeros_has_a_gradient_of_zero_and_masked_channels_count_nothing():
    model = net()
    penalty = fp.regularizers.GroupLasso(fp.couple(model, X), 1.0)
    before = penalty(model).item()
    fp.global_prune(model, sparsity=0.5, granularity="channel", example_inputs=X)
    loss = penalty(model)
    loss.backward()
    assert loss.item() < before
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_copy_and_a_smaller_model_are_models_of_their_own():
    model = net()
    coupling = fp.couple(model, X)
    penalty = fp.regularizers.GroupLasso(coupling, 1.0)
    twin = deepcopy(model)
    nn.init.zeros_(twin[5].weight)
    assert penalty(twin) < penalty(model)
    fp.global_prune(model, sparsity=0.5, granularity="channel", coupling=coupling)
    with pytest.raises(ValueError, match="has position .* which has"):
        penalty(fp.shrink(model, X))
    penalty(model)
    fp.shrink(model, X, inplace=True)
    with pytest.raises(ValueError, match="has position .* which has"):
        penalty(model)
    assert penalty(twin).item() == fp.regularizers.GroupLasso(coupling, 1.0)(twin).item()


def test_a_penalty_is_copied_and_pickled_with_its_words():
    model = net()
    penalty = fp.regularizers.GroupLasso(fp.couple(model, X), 0.5, scored_by="scale", exclude="3")
    value = penalty(model).item()
    assert deepcopy(penalty)(model).item() == value
    assert pickle.loads(pickle.dumps(penalty))(model).item() == value


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_penalties_of_half_precision_are_summed_in_float32(dtype):
    """400 channels of 400 ones: the sum is 160,000, above what float16 has."""
    model = nn.Sequential(nn.Linear(200, 400, bias=False), nn.Linear(400, 200, bias=False)).to(dtype)
    for parameter in model.parameters():
        nn.init.constant_(parameter, 1.0)
    group = fp.Group("0.weight", (fp.Slice("0.weight", 0, torch.arange(400), "producer"), fp.Slice(
        "1.weight", 1, torch.arange(400), "consumer")))  # fmt: skip
    penalty = fp.regularizers.GroupLasso(fp.Coupling((group,)), 1e-6)(model)
    assert penalty.item() == pytest.approx(0.16, rel=1e-3)
    penalty.backward()
    assert model[0].weight.grad.isfinite().all()
    decay = fp.regularizers.GrowingDecay({"0.weight": torch.zeros(400, 200, dtype=torch.bool)}, by=1e-6)
    decay.step()
    assert decay(model).item() == pytest.approx(0.04, rel=1e-3)


def test_growing_decay_is_over_what_would_be_removed():
    model = net()
    copy = deepcopy(model)
    fp.global_prune(copy, sparsity=0.5, granularity="channel", example_inputs=X)
    masks = fp.masks(copy)
    decay = fp.regularizers.GrowingDecay(masks, by=0.25, most=0.6)
    assert decay(model).item() == 0
    for strength in (0.25, 0.5, 0.6, 0.6):
        decay.step()
        expected = sum((dict(model.named_parameters())[name][~mask] ** 2).sum() for name, mask in masks.items())
        assert decay(model).item() == pytest.approx(strength / 2 * expected.item(), rel=1e-12)
    decay(model).backward()
    assert not model[0].weight.grad[masks["0.weight"]].any()


@pytest.mark.parametrize("masks", [{}, {"nope": torch.ones(2).bool()}])
def test_masks_that_do_not_fit(masks):
    with pytest.raises(ValueError, match=r"masks= is empty|has no parameter 'nope'"):
        fp.regularizers.GrowingDecay(masks, by=0.1)(net())


@pytest.mark.parametrize(("by", "most"), [(-0.1, 1.0), (0.1, -1.0), (float("nan"), 1.0)])
def test_a_strength_below_zero_is_refused(by, most):
    with pytest.raises(ValueError, match="by= and most= should be at least 0, got .*: a negative strength makes"):
        fp.regularizers.GrowingDecay({"0.weight": torch.ones(8, 3, 3, 3).bool()}, by=by, most=most)


@pytest.mark.parametrize("kind", ["lasso", "growing"])
def test_less_is_lost_by_a_prune_after_training_with_it(kind):
    """Two fifths of the channels are pruned: the loss rises less than after training without."""
    lost = {}
    target = X.mean((2, 3))[:, :2] * 3  # which few channels can give
    for penalised in (False, True):
        model = net()
        coupling = fp.couple(model, X)
        lasso = fp.regularizers.GroupLasso(coupling, 1e-2)
        copy = deepcopy(model)
        fp.global_prune(copy, sparsity=0.4, granularity="channel", coupling=coupling)
        growing = fp.regularizers.GrowingDecay(fp.masks(copy), by=0.05, most=5.0)
        optimizer = torch.optim.SGD(model.parameters(), 0.02)
        for _ in range(300):
            optimizer.zero_grad()
            growing.step()
            penalty = lasso(model) if kind == "lasso" else growing(model)
            (nn.functional.mse_loss(model(X), target) + (penalty if penalised else 0)).backward()
            optimizer.step()
        model.eval()
        before = nn.functional.mse_loss(model(X), target).item()
        fp.global_prune(model, "magnitude", 0.4, granularity="channel", coupling=coupling, scored_by="group")
        lost[penalised] = nn.functional.mse_loss(model(X), target).item() - before
    assert lost[True] < 0.5 * lost[False]

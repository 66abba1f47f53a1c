"""Weights that come back: how many, which, with what values, and what optimizers remember of them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import torch_flowprune as fp


def net(pruned: float = 0.75) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    if pruned:
        fp.global_prune(model, "magnitude", pruned, scope="layer")
    return model


def batch(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(20, 6, dtype=torch.float64, generator=made), torch.randint(3, (20,), generator=made)


def left(model: nn.Module) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in fp.masks(model).items()}


@pytest.mark.parametrize("needs", [("g",), ("g", "Hg"), ("g2_sample",)])
@pytest.mark.parametrize("batches", [1, 3])
def test_flow_under_masks_is_that_of_the_model_whose_zeros_are_values(needs, batches):
    model, data = net(), [batch(i) for i in range(batches)]
    got = fp.flow(model, data, needs=needs, under_masks=True)
    want = fp.flow(fp.remove(copy.deepcopy(model)), data, needs=needs)
    for kind in needs:
        for name, value in want.tensors(kind).items():
            torch.testing.assert_close(got.tensors(kind)[name], value, rtol=1e-12, atol=1e-14)
    assert got.g is None or got.g["0.weight"][~fp.masks(model)["0.weight"]].any()


def test_flow_under_masks_leaves_no_trace():
    model = net()
    before = copy.deepcopy(model.state_dict())
    fp.flow(model, batch(), needs=("g",), under_masks=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    fp_g = fp.flow(model, batch(), needs=("g",)).tensors("g")["0.weight"]
    assert not fp_g[~fp.masks(model)["0.weight"]].any()


def test_flow_under_masks_with_a_budget_of_memory():
    model, data = net(), [batch()]
    want = fp.flow(model, data, needs=("g",), under_masks=True).tensors("g")
    got = fp.flow(model, data, needs=("g",), under_masks=True, max_memory="1GB").tensors("g")
    torch.testing.assert_close(got["0.weight"], want["0.weight"])


def test_flow_under_masks_of_a_standardised_convolution():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    layer = timm.layers.StdConv2d(3, 4, 3, padding=0).double()
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(4, 3).double())
    data = (torch.randn(5, 3, 3, 3, dtype=torch.float64), torch.randint(3, (5,)))
    fp.global_prune(model, "magnitude", 0.5, include="0.weight")
    mask, weight = fp.masks(model)["0.weight"], layer.weight_orig.detach() * layer.weight_mask
    weight = weight.requires_grad_()
    rows = (weight.flatten(1) - weight.flatten(1).mean(1, keepdim=True)) / (
        weight.flatten(1).var(1, unbiased=False, keepdim=True) + layer.eps
    ).sqrt()
    kernel = rows.view_as(weight)
    kernel = torch.where(mask, kernel, kernel - kernel.detach())  # the same values, the gradient of all
    out = model[2](nn.functional.conv2d(data[0], kernel, layer.bias).flatten(1))
    (want,) = torch.autograd.grad(nn.functional.cross_entropy(out, data[1]), weight)
    got = fp.flow(model, data, needs=("g",), under_masks=True).tensors("g")["0.weight"]
    torch.testing.assert_close(got, want)


def test_flow_under_torchs_own_masks_is_refused():
    model = net(0.0)
    prune.l1_unstructured(model[0], "weight", 0.5)
    with pytest.raises(ValueError, match="one of torch's own"):
        fp.flow(model, batch(), needs=("g",), under_masks=True)
    with pytest.raises(ValueError, match="gR has no values under the masks"):
        fp.flow(model, batch(), needs=("gR",), under_masks=True)


@pytest.mark.parametrize(("fraction", "want"), [(0.25, [18, 9]), (5, [5, 5]), ({"2.weight": 0.5}, [0, 18])])
def test_exactly_as_many_come_back(fraction, want):
    model = net()
    before = left(model)
    counts = fp.regrow(model, fraction, data=batch())
    assert [counts.get(name, 0) for name in before] == want
    assert [left(model)[name] - before[name] for name in before] == want


def test_the_steepest_come_back_with_zeros_and_nothing_else_moves():
    model = net()
    masks, dense = fp.masks(model), fp.remove(copy.deepcopy(model))
    nn.functional.cross_entropy(dense(batch()[0]), batch()[1]).backward()
    output = model(batch()[0])
    fp.regrow(model, 7, by="gradient", data=batch())
    assert torch.equal(model(batch()[0]), output)
    for index, name in ((0, "0.weight"), (2, "2.weight")):
        steep = dense[index].weight.grad.abs().masked_fill(masks[name], -1).flatten()
        wanted = masks[name].flatten().clone()
        wanted[steep.sort(descending=True, stable=True).indices[:7]] = True
        assert torch.equal(fp.masks(model)[name].flatten(), wanted)
        grown = fp.masks(model)[name] & ~masks[name]
        assert not model[index].weight_orig[grown].any()


def test_at_random_the_same_by_one_generator_and_without_data():
    one, two = net(), net()
    for model in (one, two):
        fp.regrow(model, 0.5, by="random", generator=torch.Generator().manual_seed(3))
    assert all(torch.equal(mask, fp.masks(two)[name]) for name, mask in fp.masks(one).items())


def test_by_a_function_its_highest_come_back():
    model = net()
    old = fp.masks(model)["0.weight"]

    def first(theta):
        return -torch.arange(len(theta), dtype=torch.float64)

    fp.regrow(model, {"0.weight": 4}, by=first)
    grown = (fp.masks(model)["0.weight"] & ~old).flatten().nonzero().flatten()
    assert torch.equal(grown, (~old).flatten().nonzero().flatten()[:4])


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD, torch.optim.RMSprop])
def test_an_optimizers_state_of_what_grows_is_zero(kind):
    model = net(0.0)
    options = {"momentum": 0.9} if kind is not torch.optim.Adam else {}
    optimizer = kind(model.parameters(), lr=0.1, **options)
    for _ in range(2):
        nn.functional.cross_entropy(model(batch()[0]), batch()[1]).backward()
        optimizer.step()
    fp.global_prune(model, "magnitude", 0.5)
    old = fp.masks(model)
    fp.regrow(model, 0.5, by="random", optimizer=[optimizer])
    for index in (0, 2):
        grown = fp.masks(model)[f"{index}.weight"] & ~old[f"{index}.weight"]
        states = [v for v in optimizer.state[model[index].weight_orig].values() if v.shape == grown.shape]
        assert grown.any() and states
        for state in states:
            assert not state[grown].any() and state[~grown].all()


def test_what_grows_trains_and_held_zeros_follow():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    fp.keep_zeros(model, optimizer)
    old = fp.masks(model)["0.weight"]
    fp.regrow(model, 6, data=batch(), optimizer=optimizer)
    nn.functional.cross_entropy(model(batch()[0]), batch()[1]).backward()
    optimizer.step()
    now = fp.masks(model)["0.weight"]
    assert model[0].weight[now & ~old].all() and not model[0].weight_orig[~now].any()


def test_masks_replaced_lift_and_bring_the_values_back():
    model, dense = net(), net(0.0)
    fp.apply_masks(model, {"0.weight": torch.ones(16, 6, dtype=torch.bool)})
    assert left(model)["0.weight"] == 24  # ones do not lift what is pruned
    fp.apply_masks(model, {"0.weight": torch.ones(16, 6, dtype=torch.bool)}, replace=True)
    assert torch.equal(model[0].weight, dense[0].weight)
    assert left(model)["2.weight"] == 12


def test_a_dense_state_leaves_masks_or_lifts_them():
    model, dense = net(), net(0.0)
    assert fp.masks(fp.load_state_dict(copy.deepcopy(model), dense.state_dict())).keys() == fp.masks(model).keys()
    lifted = fp.load_state_dict(model, dense.state_dict(), lift_masks=True)
    assert not fp.masks(lifted) and not prune.is_pruned(lifted)
    assert torch.equal(lifted[0].weight, dense[0].weight)
    assert [name for name, _ in lifted.named_parameters()] == [name for name, _ in dense.named_parameters()]


def test_bad_words_change_nothing():
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for error, match, call in (
        (ValueError, "cannot come back", lambda: fp.regrow(model, 1.5, data=batch())),
        (ValueError, "cannot come back", lambda: fp.regrow(model, 1000, data=batch())),
        (ValueError, "no such parameter of the model is pruned", lambda: fp.regrow(model, {"0.bias": 1})),
        (TypeError, "should be an optimizer", lambda: fp.regrow(model, 1, by="random", optimizer=3)),
        (ValueError, "measure", lambda: fp.regrow(model, 1, by="steepest")),
        (ValueError, "no masks", lambda: fp.regrow(net(0.0), 0.5, by="random")),
        (TypeError, "amount|fraction", lambda: fp.regrow(model, "half", by="random")),
    ):
        with pytest.raises(error, match=match):
            call()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

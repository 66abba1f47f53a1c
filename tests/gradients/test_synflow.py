"""Synaptic flow: the published computation on a copy, and what that code could not do."""

import copy
from contextlib import nullcontext

import cases
import oracles
import pytest
import torch
from cases import CASES, every_case
from torch import nn
from torch.profiler import ProfilerActivity, profile

import torch_flowprune as fp
from torch_flowprune.inputs.named_parameters.parameters import parameters_of
from torch_flowprune.selection.schedules import steps


@pytest.mark.parametrize(
    ("convolutions", "layers", "dtype", "narrow"),
    [(2, 1, torch.float32, True), (1, 2, torch.float32, False), (2, 1, torch.float64, False)],
)
def test_only_float32_nets_of_convolutions_are_narrowed(monkeypatch, convolutions, layers, dtype, narrow):
    entered = []
    monkeypatch.setattr(
        "torch_flowprune.gradients.synflow.narrow_convolutions", lambda: entered.append(True) or nullcontext()
    )
    model = nn.Sequential(
        *(nn.Conv2d(3, 3, 3, padding=1) for _ in range(convolutions)), *(nn.Linear(4, 4) for _ in range(layers))
    ).to(dtype)
    fp.flow(model, needs=("gR",), example_inputs=torch.ones(1, 3, 4, 4, dtype=dtype))
    assert bool(entered) == narrow


@every_case
def test_scores_are_those_of_the_absolute_copy(case):
    model, inputs = case.model(dtype=torch.float32), case.batch(3, dtype=torch.float32)[0]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = [name for name, p in model.named_parameters() if p.dim() > 1]
    found = fp.scores(model, "synflow", example_inputs=inputs, include=names)
    expected = oracles.synflow(model, case.shape, integer=bool(case.vocabulary))
    for name in names:
        torch.testing.assert_close(found[name].double(), expected[name].flatten(), rtol=1e-5, atol=0)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items()), (
        "the parameters are not touched"
    )


def test_the_shape_may_come_from_data_and_no_more_is_read():
    model, (x, y) = cases.cnn(), CASES["cnn"].batch(3)
    expected = fp.scores(model, "synflow", example_inputs=x)

    def first_then_fail():
        yield x, y
        raise AssertionError("the shape needs one batch")

    for data in ([(x, y)], first_then_fail(), {"input": x, "labels": y}):
        found = fp.scores(model, "synflow", data)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_without_a_shape():
    with pytest.raises(
        ValueError, match="an example input is needed, and there is no data: pass example_inputs=, e.g. torch.ones"
    ):
        fp.scores(cases.cnn(), "synflow")


def test_a_net_of_110_layers_is_finite():
    """Where float32, as the published code has it, overflows."""
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(110)))
    for module in model:
        nn.init.normal_(module.weight)
    inputs = torch.randn(2, 16)
    with torch.no_grad():
        absolute = {name: value.abs() for name, value in model.state_dict().items()}
        assert not torch.func.functional_call(model, absolute, torch.ones(1, 16)).isfinite().all()
    found = fp.scores(model, "synflow", example_inputs=inputs)
    assert all(value.isfinite().all() and (value > 0).all() for value in found.values())
    for name, value in oracles.synflow(model, (16,)).items():
        if name in found:
            torch.testing.assert_close(found[name].double(), value.flatten(), rtol=1e-4, atol=0)
    report = fp.global_prune(model, "synflow", sparsity=0.5, example_inputs=inputs)
    assert report.pruned == report.units // 2


def test_every_layer_of_a_chain_holds_the_same_flow():
    """What the method conserves: without biases each layer's scores add up to R itself."""
    model = nn.Sequential(
        nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False)
    ).double()
    sums = [value.sum().item() for value in fp.scores(model, "synflow", example_inputs=torch.ones(1, 4)).values()]
    assert sums == pytest.approx([sums[0]] * 3, rel=1e-12)


def test_a_net_too_deep_even_for_float64_says_so():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(20)))
    for module in model:
        nn.init.constant_(module.weight, 1e30)
    with pytest.raises(
        ValueError,
        match="the synaptic-flow objective is inf in float64: the network is too deep or its weights too large",
    ):
        fp.scores(model, "synflow", example_inputs=torch.ones(1, 8))


def test_pruned_weights_stay_out_of_the_flow():
    model = cases.mlp()
    fp.global_prune(model, sparsity=0.5)
    mask = model[0].weight_mask.flatten()
    found = fp.scores(model, "synflow", example_inputs=torch.ones(1, 4))["0.weight"]
    assert not found[~mask].any()
    assert (found[mask] > 0).all()
    fp.remove(model)
    again = fp.scores(model, "synflow", example_inputs=torch.ones(1, 4))["0.weight"]
    torch.testing.assert_close(again, found)


def test_rounds_prune_what_scores_in_float64_would():
    """Round after round by the published computation on a copy, the lowest of what is left gone."""
    model, inputs = cases.cnn().float(), CASES["cnn"].batch(1)[0].float()
    copy_ = copy.deepcopy(model)
    fp.global_prune(model, "synflow", 0.6, rounds=5, example_inputs=inputs)
    weights = {name: p for name, p in copy_.named_parameters() if name in fp.masks(model)}
    alive = {name: torch.ones(p.numel(), dtype=torch.bool) for name, p in weights.items()}
    total = sum(map(torch.numel, weights.values()))
    for share in steps("exponential", 5, 0.0, 0.6):
        scores = oracles.synflow(copy_, tuple(inputs.shape[1:]))
        gone = total - sum(int(left.sum()) for left in alive.values())
        cut = oracles.lowest(
            [scores[name].flatten() for name in weights], round(share * total) - gone, list(alive.values())
        )
        alive = dict(zip(weights, cut, strict=True))
        with torch.no_grad():
            for name, p in weights.items():
                p.mul_(alive[name].view_as(p))
    assert all(torch.equal(fp.masks(model)[name].flatten(), left) for name, left in alive.items())


def test_what_a_mask_removed_has_no_gradient_whatever_its_value():
    model = cases.cnn().float()
    fp.global_prune(model, "random", 0.4, generator=torch.Generator().manual_seed(0))
    expected = fp.flow(model, needs=("gR",), example_inputs=CASES["cnn"].batch(1)[0].float()).gR
    with torch.no_grad():
        for name, mask in fp.masks(model).items():
            parameters_of(model)[name].parameter[~mask] = float("inf")
    found = fp.flow(model, needs=("gR",), example_inputs=CASES["cnn"].batch(1)[0].float()).gR
    for name, mask in fp.masks(model).items():
        assert not found[name][~mask].any()
        assert torch.equal(found[name], expected[name])


def test_what_is_masked_is_not_masked_again_in_the_pass():
    """Selecting takes as long as a good part of the pass itself."""
    model, inputs = cases.cnn().float(), CASES["cnn"].batch(1)[0].float()
    fp.global_prune(model, sparsity=0.5)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        fp.flow(model, needs=("gR",), example_inputs=inputs)
    names = {event.name for event in profiled.events()}
    assert "aten::convolution" in names
    assert "aten::where" not in names


def test_a_buffer_outside_the_state_dict_keeps_its_sign():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 1, bias=False).double()
            self.register_buffer("saved", torch.full((2,), -2.0, dtype=torch.float64))
            self.register_buffer("unsaved", torch.full((2,), -1.0, dtype=torch.float64), persistent=False)

        def forward(self, x):
            return self.fc(x * self.saved + self.unsaved)

    model = Shifted()
    found = fp.scores(model, "synflow", example_inputs=torch.ones(1, 2))["fc.weight"]
    torch.testing.assert_close(found, model.fc.weight.detach().abs().flatten() * (2 - 1))


class Difference(nn.Module):
    """What PoolFormers mix by: large values less nearly equal ones."""

    def __init__(self, read):
        super().__init__()
        self.read = read

    def forward(self, x):
        return self.read(x)


READ = {
    "a difference": lambda x: nn.functional.avg_pool2d(x, 3, 1, 1) - x,
    "softmax": lambda x: x.flatten(2).softmax(1).view_as(x) * x,
    "group norm": lambda x: nn.functional.group_norm(x, 2),
    "its variance": lambda x: x * x.var((2, 3), keepdim=True),
}


@pytest.mark.parametrize("read", READ.values(), ids=READ)
def test_convolutions_are_wide_where_a_difference_of_what_they_give_is_read(read):
    """There the relative error of float32 grows; elsewhere scores differ by it alone."""
    torch.manual_seed(0)
    layers = [
        layer for _ in range(4) for layer in (nn.Conv2d(4, 4, 3, padding=1), Difference(read), nn.Conv2d(4, 4, 1))
    ]
    model = nn.Sequential(nn.Conv2d(3, 4, 3), *layers)
    found, expected = (
        fp.scores(one, "synflow", example_inputs=torch.ones(1, 3, 9, 9).to(next(one.parameters())))
        for one in (model, copy.deepcopy(model).double())
    )
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-11, atol=0)

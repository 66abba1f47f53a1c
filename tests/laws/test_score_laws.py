"""Laws that every score obeys, on random small nets."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torch_flowprune as fp

pytestmark = pytest.mark.filterwarnings(
    "ignore::torch_flowprune.LayerCollapseWarning", "ignore::torch_flowprune.TiedScoresWarning"
)


RELU_NET = ("0.weight", "2.weight")


def relu_net(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).double()


def batch(seed, size=6):
    source = torch.Generator().manual_seed(seed)
    return torch.randn(size, 5, generator=source, dtype=torch.float64), torch.randint(3, (size,), generator=source)


seeds = st.integers(0, 10_000)
quick = settings(max_examples=30, deadline=None, derandomize=True)
DETERMINISTIC = [name for name in fp.MEASURES if name not in ("random", "obd")]  # probes are drawn too


def scores(model, method, data, **options):
    if method == "distance_biased_loss_preservation":
        options["theta0"] = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    return fp.scores(model, method, data, **options)


@pytest.mark.parametrize("method", DETERMINISTIC)
@given(seed=seeds)
@quick
def test_scores_go_with_the_channels_when_these_are_permuted(method, seed):
    model, data = relu_net(seed), batch(seed)
    order = torch.randperm(4)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[0].weight.copy_(model[0].weight[order])
        twin[0].bias.copy_(model[0].bias[order])
        twin[2].weight.copy_(model[2].weight[:, order])
    for granularity in ("weight", "filter"):
        found, permuted = (scores(net, method, data, granularity=granularity) for net in (model, twin))
        units = found["0.weight"].view(4, -1)[order].flatten()
        torch.testing.assert_close(permuted["0.weight"], units)


@pytest.mark.parametrize("method", ["loss_preservation", "taylor"])
@given(seed=seeds, scale=st.floats(0.1, 10))
@quick
def test_first_order_scores_do_not_see_a_rescaling_that_leaves_the_loss(method, seed, scale):
    model, data = relu_net(seed), batch(seed)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[0].weight.mul_(scale)
        twin[0].bias.mul_(scale)
        twin[2].weight.div_(scale)
    found, rescaled = scores(model, method, data), scores(twin, method, data)
    for name in RELU_NET:
        torch.testing.assert_close(rescaled[name], found[name])
    if abs(scale - 1) > 0.01:
        assert not torch.allclose(
            scores(twin, "magnitude", data)["0.weight"], scores(model, "magnitude", data)["0.weight"]
        )


@given(seed=seeds, temperature=st.floats(0.5, 50))
@quick
def test_a_temperature_is_a_division_of_the_last_layer_before_the_loss(seed, temperature):
    model, data = relu_net(seed), batch(seed)
    found = fp.flow(model, data, temperature=temperature)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[2].weight.div_(temperature)
        twin[2].bias.div_(temperature)
    divided = fp.flow(twin, data, needs=("g",))
    torch.testing.assert_close(found.g["0.weight"], divided.g["0.weight"])
    torch.testing.assert_close(found.g["2.weight"] * temperature, divided.g["2.weight"])
    assert found.loss == pytest.approx(divided.loss)


@pytest.mark.parametrize("method", [name for name in DETERMINISTIC if name != "fisher"])
@given(seed=seeds, cuts=st.lists(st.integers(1, 5), max_size=3, unique=True))
@quick
def test_scores_do_not_depend_on_how_the_data_are_split(method, seed, cuts):
    model, (inputs, labels) = relu_net(seed), batch(seed)
    bounds = [0, *sorted(cuts), 6]
    parts = [(inputs[a:b], labels[a:b]) for a, b in itertools.pairwise(bounds)]
    whole, split = scores(model, method, (inputs, labels)), scores(model, method, parts)
    for name in RELU_NET:
        torch.testing.assert_close(split[name], whole[name])


@pytest.mark.parametrize("granularity", ["weight", "filter"])
@given(seed=seeds, low=st.floats(0, 1), high=st.floats(0, 1), method=st.sampled_from(DETERMINISTIC))
@quick
def test_masks_are_monotone_in_the_sparsity(granularity, seed, low, high, method):
    low, high = sorted((low, high))
    found = scores(relu_net(seed), method, batch(seed), granularity=granularity)
    few, many = relu_net(seed), relu_net(seed)
    fp.global_prune(few, sparsity=low, scores=found, min_keep=0)
    fp.global_prune(many, sparsity=high, scores=found, min_keep=0)
    for name, mask in fp.masks(few).items():
        assert not (fp.masks(many)[name] & ~mask).any()


@given(seed=seeds, sparsity=st.floats(0, 1), method=st.sampled_from(DETERMINISTIC))
@quick
def test_pruning_to_the_same_sparsity_again_changes_nothing(seed, sparsity, method):
    model, data = relu_net(seed), batch(seed)
    theta0 = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    fp.global_prune(model, method, sparsity, data=data, theta0=theta0)
    before = {name: mask.clone() for name, mask in fp.masks(model).items()}
    again = fp.global_prune(model, method, sparsity, data=data, theta0=theta0)
    assert not sum(layer.newly_pruned for layer in again.layers)
    assert before.keys() == fp.masks(model).keys()
    assert all(torch.equal(mask, before[name]) for name, mask in fp.masks(model).items())

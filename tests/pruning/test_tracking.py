"""What a pruner remembers between minibatches, and between runs."""

import sys

import pytest
import torch
from torch import nn

import torch_flowprune as fp

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def test_a_state_of_an_earlier_version_is_an_error_that_says_so():
    pruner = fp.Pruner(net(), "magnitude", 0.5, rounds=2)
    state = pruner.state_dict()
    for key in state.keys() - {"costs"}:
        with pytest.raises(ValueError, match=f"not the state of a Pruner of this version: it has no {key};"):
            pruner.load_state_dict({name: value for name, value in state.items() if name != key})


@pytest.mark.parametrize("words", [{"sparsity": 0.5}, {"amount": 0.1}])
def test_more_rounds_than_units_are_refused_at_once(words):
    with pytest.raises(ValueError, match="rounds=1000000000 are more than there are units to prune"):
        fp.Pruner(net(), "magnitude", rounds=10**9, **words)


def _backward(model):
    model.zero_grad()
    model(X).square().mean().backward()


def test_tracking_looks_for_what_may_go_once_for_each_set_of_masks(monkeypatch):
    model = net()
    pruner = fp.Pruner(model, "taylor", 0.5, rounds=2, granularity="filter")
    looks, look = [], fp.Pruner._candidates
    monkeypatch.setattr(fp.Pruner, "_candidates", lambda self, data=None: [looks.append(data), look(self, data)][1])
    for _ in range(3):
        _backward(model)
        pruner.track()
    assert len(looks) == 1
    pruner.step()
    looks.clear()
    for _ in range(2):
        _backward(model)
        pruner.track()
    assert len(looks) == 1
    with torch.no_grad():
        next(target for target in model.buffers() if target.dtype is torch.bool).fill_(False)  # in place
    _backward(model)
    pruner.track()
    assert len(looks) == 2


@pytest.mark.parametrize("change", ["replaced", "added", "resized"])
def test_tracking_sees_that_the_model_is_another(change):
    model = net()
    pruner = fp.Pruner(model, "taylor", 0.5, rounds=2)
    _backward(model)
    pruner.track()
    if change == "replaced":
        model[0].weight = nn.Parameter(model[0].weight.detach() * 2)
        _backward(model)
        pruner.track()
        return
    if change == "added":
        model.append(nn.Linear(3, 3))
    else:
        model[0].weight.data, model[0].weight.grad = model[0].weight.data[:, :-1], None
    with pytest.raises(ValueError, match="the model is not the one that this pruner knows"):
        pruner.track()


def test_a_gradient_sum_that_overflows_is_no_overflow():
    model = nn.Linear(4, 4, bias=False)
    pruner = fp.Pruner(model, "taylor", 0.5)
    model.weight.grad = torch.full((4, 4), 3e38)
    pruner.track()
    assert pruner.minibatches == 1
    model.weight.grad = torch.full((4, 4), 1.0).index_put(
        (torch.tensor(0), torch.tensor(0)), torch.tensor(float("nan"))
    )
    pruner.track()
    assert pruner.minibatches == 1


@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_a_minibatch_walks_over_the_model_once(granularity):
    """And looks at no signature layer by layer: what is the same for all minibatches and layers is found once."""
    model = nn.Sequential(*(part for _ in range(12) for part in (nn.Linear(8, 8), nn.ReLU())), nn.Linear(8, 3))
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    pruner = fp.Pruner(model, "taylor", 0.5, granularity=granularity, example_inputs=x)
    calls = []

    def seen(frame, event, _):
        if event == "call" and frame.f_code.co_name in {"parameters_of", "signature", "couple"}:
            calls.append(frame.f_code.co_name)

    for _ in range(2):
        model.zero_grad()
        model(x).square().sum().backward()
        calls.clear()
        sys.setprofile(seen)
        try:
            pruner.track()
        finally:
            sys.setprofile(None)
    assert calls.count("parameters_of") == 1
    assert calls.count("signature") < 13  # layers
    assert "couple" not in calls

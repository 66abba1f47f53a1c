"""Batch-norm statistics taken anew: the sample-weighted means of the batches', and no trace elsewhere."""

import cases
import pytest
import torch
from torch import nn

import torch_flowprune as fp

BATCHES = [(torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(n)), torch.zeros(n)) for n in (6, 2)]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, momentum=0.3), nn.Dropout(), nn.Flatten())


def test_the_statistics_are_those_of_the_data():
    model = net().train()
    with torch.no_grad():
        outputs = [model[0](x) for x, _ in BATCHES]
    weights = torch.tensor([0.75, 0.25])
    mean = sum(w * y.mean((0, 2, 3)) for w, y in zip(weights, outputs, strict=True))
    var = sum(w * y.transpose(0, 1).flatten(1).var(1) for w, y in zip(weights, outputs, strict=True))
    assert fp.recalibrate(model, BATCHES) is model
    torch.testing.assert_close(model[1].running_mean, mean)
    torch.testing.assert_close(model[1].running_var, var)
    assert int(model[1].num_batches_tracked) == 2


def test_nothing_else_is_touched():
    model = net()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = {name: value.clone() for name, value in model.state_dict().items() if "running" not in name}
    rng, flags = torch.get_rng_state(), [module.training for module in model.modules()]
    fp.recalibrate(model, BATCHES, max_samples=4)
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items() if "tracked" not in name)
    assert (model[1].momentum, [module.training for module in model.modules()]) == (0.3, flags)
    assert torch.equal(torch.get_rng_state(), rng)
    assert (model[0].weight.grad == 1).all()


def test_a_failure_leaves_the_statistics():
    model = net()
    before = model[1].running_mean.clone()
    with pytest.raises(RuntimeError):
        fp.recalibrate(model, [*BATCHES, (torch.randn(2, 4, 8, 8), torch.zeros(2))])
    with pytest.raises(ValueError, match="the data is empty"):
        fp.recalibrate(model, [])
    assert torch.equal(model[1].running_mean, before)
    assert int(model[1].num_batches_tracked) == 0


def test_a_model_without_such_norms_is_told_so():
    with pytest.raises(ValueError, match="no batch norm with running statistics"):
        fp.recalibrate(cases.mlp(), BATCHES)

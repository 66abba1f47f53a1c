"""Averages of a model that is pruned in rounds: their masks are the model's."""

from __future__ import annotations

import copy
import pickle
import types

import pytest
import torch
from hosts import mlp, pruned, snapshot, train
from torch import nn
from torch.optim import swa_utils

import torch_flowprune as fp

X = torch.linspace(-1, 1, 24).view(3, 8)
EMA = swa_utils.get_ema_multi_avg_fn(0.9)


class FloatsOnly:
    """Such as ultralytics': a copy under ``.ema``, of which the floats are averaged, by name."""

    def __init__(self, model):
        self.ema = copy.deepcopy(model)

    def update(self, model):
        state = model.state_dict()
        with torch.no_grad():
            for name, value in self.ema.state_dict().items():
                if value.is_floating_point():
                    value.mul_(0.9).add_(state[name], alpha=0.1)


def of_torch(**options):
    def make(model):
        average = swa_utils.AveragedModel(model, **options)
        average.update = average.update_parameters
        return average

    return make


def of_timm(name, **options):
    def make(model):
        return getattr(pytest.importorskip("timm.utils.model_ema"), name)(model, decay=0.9, **options)

    return make


AVERAGES = {
    "torch": of_torch(),
    "torch, EMA": of_torch(multi_avg_fn=EMA),
    "torch, one function a tensor": of_torch(avg_fn=swa_utils.get_ema_avg_fn(0.9)),
    "torch, buffers": of_torch(use_buffers=True),
    "torch, EMA, buffers": of_torch(multi_avg_fn=EMA, use_buffers=True),
    "timm V2": of_timm("ModelEmaV2"),
    "timm V3": of_timm("ModelEmaV3"),
    "timm V3, without foreach": of_timm("ModelEmaV3", foreach=False),
    "timm V3, without buffers": of_timm("ModelEmaV3", exclude_buffers=True),
    "floats only": FloatsOnly,
}


def inside(average):
    return getattr(average, "ema", None) or average.module


def net():
    """With statistics, which are buffers to be averaged, before and after masks in the order."""
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))


@pytest.mark.parametrize("born", ["dense", "pruned"])
@pytest.mark.parametrize("kind", AVERAGES)
def test_averages_follow_the_masks_of_every_round(kind, born):
    """The oracle: an average by hand, of the values under the masks."""
    model = net()
    if born == "pruned":
        pruned(model, 0.3)
    average = AVERAGES[kind](model)
    for sparsity in (0.5, 0.8):
        pruned(model, sparsity)
        fp.sync_masks(model, average)
        for _ in range(2):
            before = [parameter.detach().clone() for parameter in inside(average).parameters()]
            train(model, X, steps=1)
            average.update(model)
            weight = 0.1 if getattr(average, "avg_fn", None) or "torch" not in kind or "EMA" in kind else None
            if weight:
                for old, now, new in zip(before, model.parameters(), inside(average).parameters(), strict=True):
                    if not hasattr(average, "n_averaged") or average.n_averaged > 1:
                        torch.testing.assert_close(new, old.lerp(now, weight))
        for layer in (1, 4):
            assert torch.equal(inside(average)[layer].weight_mask, model[layer].weight_mask)
            assert torch.equal(inside(average)[layer].weight == 0, model[layer].weight == 0)


def test_equal_weights_over_buffers_are_equal_weights():
    """Which torch cannot do with bool buffers: the mean of all values, and of the statistics."""
    model = pruned(net())
    average = swa_utils.AveragedModel(model, use_buffers=True)
    fp.sync_masks(model, average)
    seen = []
    for _ in range(3):
        train(model, X, steps=1)
        average.update_parameters(model)
        seen.append((model[1].weight_orig.detach().clone(), model[0].running_mean.clone()))
    weights, means = zip(*seen, strict=True)
    torch.testing.assert_close(average.module[1].weight_orig, torch.stack(weights).mean(0))
    torch.testing.assert_close(average.module[0].running_mean, torch.stack(means).mean(0))
    assert pickle.loads(pickle.dumps(average)).multi_avg_fn is average.multi_avg_fn


def test_without_the_call_an_average_keeps_the_first_masks():
    """Why it is there: should torch's averages follow one day, this fails, and the call may go."""
    model = pruned(net(), 0.3)
    average = AVERAGES["torch, EMA, buffers"](model)
    average.update(model)
    pruned(model, 0.8)
    average.update(model)
    assert (average.module[1].weight == 0).sum() < (model[1].weight == 0).sum()


@pytest.mark.parametrize("kind", AVERAGES)
def test_a_pruner_keeps_its_averages_in_step(kind):
    model = net()
    average, late = AVERAGES[kind](model), None
    pruner = fp.Pruner(model, "magnitude", 0.8, rounds=2, averages=(one for one in [average]))
    while not pruner.done:
        pruner.step()
        if late is None:
            pruner.averages.append(late := AVERAGES[kind](model))
        train(model, X)
        for one in pruner.averages:
            one.update(model)
    for one in (average, late):
        assert all(torch.equal(mask, fp.masks(model)[name]) for name, mask in fp.masks(inside(one)).items())


def test_masks_that_are_gone_from_the_model_go_from_the_average():
    model = pruned()
    average = copy.deepcopy(model)
    values = average[0].weight_orig
    fp.sync_masks(fp.remove(model), average)
    assert not fp.masks(average)
    assert average[0].weight is values
    assert type(average[0]) is nn.Linear


def test_masks_are_the_averages_own():
    model, average = mlp(), mlp()
    pruned(model)
    fp.sync_masks(model, average)
    assert average[0].weight_mask is not model[0].weight_mask
    assert average[0].weight_mask.dtype is torch.bool


def test_all_averages_or_none():
    model, one, other = pruned(), mlp(), nn.Sequential(nn.Linear(8, 8))
    before = snapshot(one)
    for bad in (other, nn.Sequential(nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 4)), types.SimpleNamespace(ema=3)):
        text = f"expected averages of this model, and found none in {type(bad).__name__}"
        with pytest.raises(ValueError, match=text):
            fp.sync_masks(model, one, bad)
        with pytest.raises(ValueError, match=text):
            fp.Pruner(model, sparsity=0.9, averages=[one, bad])
    assert snapshot(one) == before


def test_a_pruner_looks_at_averages_before_it_prunes():
    model = mlp()
    pruner = fp.Pruner(model, sparsity=0.5)
    pruner.averages.append(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="expected averages of this model"):
        pruner.step()
    assert not fp.masks(model)
    assert pruner.round == 0

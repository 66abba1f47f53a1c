"""Zeros held under an optimizer: of whatever mask was the latest, whatever wraps the optimizer."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hosts import mlp, pruned, train
from torch import nn
from torch.nn.utils import prune

import torch_flowprune as fp

X = torch.linspace(-1, 1, 24).view(3, 8)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)


def zeros(model):
    return sum(int((layer.weight == 0).sum()) for layer in (model[0], model[2]))


def by_torch(model):
    for layer in (model[0], model[2]):
        prune.l1_unstructured(layer, "weight", 0.8)


def remove_by_torch(model):
    for layer in (model[0], model[2]):
        prune.remove(layer, "weight")


@pytest.mark.parametrize("trained", [True, False], ids=["trained between", "at once"])
@pytest.mark.parametrize("remove", [fp.remove, remove_by_torch])
@pytest.mark.parametrize("first", [True, False], ids=["before the first prune", "after it"])
def test_the_latest_mask_is_held_after_remove(first, remove, trained):
    """Also where no step lies between the last round and the removal, so that no hook has seen its mask."""
    model = mlp()
    optimizer = sgd(model)
    train(model, X, optimizer)
    if first:
        fp.keep_zeros(model, optimizer)
    pruned(model, 0.3)
    if not first:
        fp.keep_zeros(model, optimizer)
    train(model, X, optimizer)
    pruned(model, 0.8)
    if trained:
        train(model, X, optimizer)
    remove(model)
    before = zeros(model)
    assert before == round(0.8 * 96)
    train(model, X, optimizer)
    assert zeros(model) == before


def test_the_masks_of_torch_are_held_too():
    model = mlp()
    optimizer = sgd(model)
    train(model, X, optimizer)
    fp.keep_zeros(model, optimizer)
    by_torch(model)
    gone = [layer.weight_mask == 0 for layer in (model[0], model[2])]
    train(model, X, optimizer)
    assert not any(layer.weight_orig[entries].any() for layer, entries in zip((model[0], model[2]), gone, strict=True))
    remove_by_torch(model)
    train(model, X, optimizer)
    assert not any(layer.weight[entries].any() for layer, entries in zip((model[0], model[2]), gone, strict=True))


def test_a_mask_that_is_taken_off_is_not_held():
    model = pruned()
    optimizer = sgd(model)
    fp.keep_zeros(model, optimizer)
    one_masked = fp.state_dict(pruned(mlp(), include="2"))
    fp.load_state_dict(model, one_masked)
    assert set(fp.masks(model)) == {"2.weight"}
    nn.init.ones_(model[0].weight)
    train(model, X, optimizer)
    assert model[0].weight.all()
    assert not model[2].weight_orig[~model[2].weight_mask].any()


def test_a_parameter_of_another_shape_is_not_held():
    model = pruned()
    optimizer = sgd(model)
    fp.keep_zeros(model, optimizer)
    fp.remove(model)
    model[2] = nn.Linear(8, 3)
    train(model, X, torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer.step()
    assert model[2].weight.all()
    assert not model[0].weight.all()


class Outer(torch.optim.Optimizer):
    """Such as accelerate's and timm's: an optimizer by its class, that has not made itself one."""

    def __init__(self, optimizer, name):
        setattr(self, name, optimizer)
        self.name = name

    state = property(lambda self: getattr(self, self.name).state)
    param_groups = property(lambda self: getattr(self, self.name).param_groups)

    def zero_grad(self):
        getattr(self, self.name).zero_grad()

    def step(self):
        getattr(self, self.name).step()


class Foreign:
    """Such as fastai's: no optimizer of torch's at all, with state by parameter."""

    def __init__(self, parameters):
        self.parameters, self.state = list(parameters), {}

    def zero_grad(self):
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self):
        for parameter in self.parameters:
            average = self.state.setdefault(parameter, {"average": torch.ones_like(parameter)})["average"]
            parameter.sub_(0.1 * average.lerp_(parameter.grad, 0.5))


def lookahead(model):
    return pytest.importorskip("timm.optim").Lookahead(sgd(model), k=2)


def accelerated(model):
    return pytest.importorskip("accelerate").Accelerator(cpu=True).prepare(sgd(model))


def of_fastai(model):
    return pytest.importorskip("fastai.optimizer").Adam(list(model.parameters()), lr=0.1, wd=0.1)


def wrapped_by_fastai(model):
    optimizer = pytest.importorskip("fastai.optimizer").OptimWrapper
    return optimizer(list(model.parameters()), torch.optim.AdamW, lr=0.1)


WRAPPERS = {
    "optimizer": lambda model: Outer(sgd(model), "optimizer"),
    "two deep": lambda model: Outer(Outer(sgd(model), "optim"), "_optimizer"),
    "foreign": lambda model: Foreign(model.parameters()),
    "foreign inside": lambda model: Outer(Foreign(model.parameters()), "opt"),
    "timm's Lookahead": lookahead,
    "accelerate": accelerated,
    "fastai": of_fastai,
    "fastai's wrapper": wrapped_by_fastai,
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_wrapped_optimizers(kind):
    model = mlp()
    optimizer = WRAPPERS[kind](model)
    train(model, X, optimizer, steps=3)
    handle = fp.keep_zeros(model, optimizer)
    pruned(model)
    masks = fp.masks(model)
    train(model, X, optimizer)
    assert not model[0].weight_orig[~masks["0.weight"]].any()
    fp.remove(model)
    train(model, X, optimizer, steps=5)
    assert not model[0].weight[~masks["0.weight"]].any()
    handle.remove()
    with torch.no_grad():
        model[0].weight.add_(1)
    train(model, X, optimizer)
    assert model[0].weight[~masks["0.weight"]].any(), "the handle ends it"


@pytest.mark.parametrize("kind", [None, "foreign"])
def test_what_holds_zeros_is_pickled_and_copied(kind):
    model = mlp()
    optimizer = WRAPPERS[kind](model) if kind else sgd(model)
    handle = fp.keep_zeros(model, optimizer)
    pruned(model)
    train(model, X, optimizer)
    for copied in (pickle.loads(pickle.dumps((model, optimizer, handle))), copy.deepcopy((model, optimizer))):
        other, its_optimizer = copied[:2]
        assert torch.equal(other[0].weight, model[0].weight)
        train(other, X, its_optimizer)


def test_codes_of_eight_bits_are_left_alone():
    """Byte 0 of a quantised state is not the number 0."""
    model = pruned(nn.Linear(8, 8))
    optimizer = sgd(model)
    codes = optimizer.state[model.weight_orig]["codes"] = torch.full((8, 8), 7, dtype=torch.uint8)
    floats = optimizer.state[model.weight_orig]["floats"] = torch.ones(8, 8)
    fp.keep_zeros(model, optimizer)
    assert (codes == 7).all()
    assert torch.equal(floats != 0, model.weight_mask)


def test_what_is_no_optimizer_is_refused():
    with pytest.raises(TypeError, match="expected an optimizer or a wrapper around one, got Sequential"):
        fp.keep_zeros(mlp(), mlp())

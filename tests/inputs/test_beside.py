"""Modules beside the model that a loss runs: a call leaves what they remember as it was."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

import torch_flowprune as fp
from torch_flowprune.inputs.guards.beside import modules_beside

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
DATA = [(X[:8], torch.arange(8) % 3), (X[8:], torch.arange(8) % 3)]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


TEACHER = net()
TEACHER[1].momentum = 0.5


def distance(teacher, model, batch):
    return (teacher(batch[0]) - model(batch[0])).square().mean()


def of_a_global(model, batch):
    return distance(TEACHER, model, batch)


class Trainer:
    def __init__(self):
        self.models = {"teacher": TEACHER}

    def loss(self, model, batch):
        return distance(self.models["teacher"], model, batch)

    def __call__(self, model, batch):
        return self.loss(model, batch)


def of_a_cell(teacher):
    return lambda model, batch: distance(teacher, model, batch)


CLOSURES = {
    "cell": of_a_cell(TEACHER),
    "default": lambda model, batch, teacher=TEACHER: distance(teacher, model, batch),
    "global": of_a_global,
    "partial": partial(distance, TEACHER),
    "method": Trainer().loss,
    "object": Trainer(),
    "nested": lambda model, batch: of_a_global(model, batch),
    "comprehension": lambda model, batch: sum(of_a_global(model, one) for one in [batch]),
}


@pytest.mark.parametrize("name", CLOSURES)
def test_they_are_found(name):
    model = net()
    assert modules_beside(model, [CLOSURES[name]]) == list(TEACHER.modules())
    assert modules_beside(TEACHER, [CLOSURES[name], None]) == []


class Perceptual(nn.Module):
    """A loss with a network in it."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))

    def forward(self, output, target):
        return self.features(output).square().mean() + output[:, 0].mean()


CALLS = {
    "flow": lambda model, **words: fp.flow(model, DATA, needs=("g", "Hg"), **words),
    "global_prune": lambda model, **words: fp.global_prune(model, "grasp", 0.5, data=DATA, **words),
    "compare": lambda model, **words: fp.compare(model, "taylor", 0.5, DATA, **words),
    "diagnose": lambda model, **words: fp.diagnose(model, DATA, **words),
    "predict": lambda model, **words: fp.predict(model, {"0.weight": X[:8] > 0}, DATA, **words),
    "hessian_vector": lambda model, **words: fp.hessian_vector(model, DATA, {"0.weight": X[:8]}, **words),
    "sensitivity": lambda model, **words: fp.sensitivity(model, "taylor", DATA, sparsities=[0.5], **words),
    "Pruner": lambda model, **words: fp.Pruner(model, "taylor", 0.5, **words).step(DATA),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_they_remember_is_left_as_it_was(call):
    model = net()
    model(X)
    loss = Perceptual()
    for words, beside in (({"closure": CLOSURES["cell"]}, TEACHER), ({"loss": loss}, loss)):
        was = copy.deepcopy(beside.state_dict())
        words["reduction"] = "mean"  # of batch statistics it is none, which a warning says
        CALLS[call](copy.deepcopy(model), **words)
        assert all(torch.equal(value, was[name]) for name, value in beside.state_dict().items())
        assert beside.training

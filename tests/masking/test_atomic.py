"""All or nothing: a fault at any step of putting masks on leaves the model as it was, bit for bit, and usable."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest
import torch
from hosts import mlp, output, pruned, snapshot, train
from torch import nn
from torch.nn.utils import prune

import torch_flowprune as fp
from torch_flowprune.inputs.named_parameters.parameters import parameters_of
from torch_flowprune.masking.carrier import hook
from torch_flowprune.pruning.methods import base_method

X = torch.linspace(-1, 1, 24).view(3, 8)
FILES = {base_method.__file__, *(str(path) for path in Path(hook.__file__).parent.glob("*.py"))}


class Fault(BaseException):
    """Not an ``Exception``, as ``KeyboardInterrupt`` is not."""


def tied():
    model = mlp()
    model.append(nn.Linear(4, 8))
    model[3].weight = nn.Parameter(torch.randn(8, 4))
    model.append(nn.Linear(8, 8))
    model[4].weight = model[0].weight
    return model


def pruned_by_torch():
    model = mlp()
    prune.l1_unstructured(model[0], "weight", 0.25)
    prune.l1_unstructured(model[0], "weight", 0.25)
    return model


def masks_for(model):
    return {
        name: torch.rand(target.parameter.shape) < 0.5
        for name, target in parameters_of(model).items()
        if target.parameter.dim() > 1
    }


def first(model):
    return next(target.owners[0] for target in parameters_of(model).values() if target.parameter.dim() > 1)


MODELS = {
    "dense": mlp,
    "pruned": lambda: pruned(sparsity=0.25),
    "tied": tied,
    "lstm": lambda: nn.LSTM(8, 8),
    "by torch": pruned_by_torch,
}
ACTIONS = {
    "apply_masks": lambda model: functools.partial(fp.apply_masks, model, masks_for(model)),
    "weights": lambda model: lambda: fp.l1_unstructured(*first(model), 0.5),
    "slices": lambda model: lambda: fp.random_structured(*first(model), 1),
    "global_prune": lambda model: (
        lambda: fp.global_prune(model, "l1", amount=0.3, rounds=2, schedule="linear", include="*weight*")
    ),
}


def seeded(action):
    torch.manual_seed(0)
    action()


def result(model):
    return {name: value.tolist() for name, value in fp.state_dict(model).items()}


class FaultAtLine:
    """Raises before the n-th line that the package's masking modules execute."""

    def __init__(self, n):
        self.left = n

    def __enter__(self):
        sys.settrace(lambda frame, event, arg: self.line if frame.f_code.co_filename in FILES else None)

    def line(self, frame, event, arg):
        self.left -= event == "line"
        if self.left == 0:
            sys.settrace(None)
            raise Fault
        return self.line

    def __exit__(self, *error):
        sys.settrace(None)


@pytest.mark.parametrize("name", ACTIONS)
@pytest.mark.parametrize("case", MODELS)
def test_a_fault_before_any_line(case, name):
    model = MODELS[case]()
    action = ACTIONS[name](model)
    before, start = snapshot(model), result(model)
    torch.manual_seed(0)
    done = 0
    while result(model) == start:
        done += 1
        try:
            with FaultAtLine(done):
                seeded(action)
        except Fault:
            assert snapshot(model) == before or result(model) != start
    assert done > 20
    usable(model, MODELS[case]())


def usable(model, twin):
    inputs = X[None] if isinstance(model, nn.LSTM) else X
    train(model, inputs)
    assert fp.masks(model)
    fp.remove(model)
    assert list(model.state_dict()) == list(fp.remove(twin).state_dict())
    output(model, inputs)


STEPS = {
    "allocation": (torch, "empty_like"),
    "copy": (torch.Tensor, "copy_"),
    "hook": (nn.Module, "register_forward_pre_hook"),
    "class": (hook, "with_masked"),
    "name": (hook, "rename"),
    "record": (hook.MaskHook, "add_pruning_method"),
}


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", STEPS)
def test_a_fault_in_any_call(step, after, monkeypatch):
    """Before the call does its work, and when it has just done it."""
    for name in ("apply_masks", "weights", "global_prune"):
        model = tied()
        action, before = ACTIONS[name](model), snapshot(model)
        reached = 0
        while True:
            calls = iter(range(reached, -1, -1))
            with monkeypatch.context() as patch:
                patch.setattr(*STEPS[step], failing(getattr(*STEPS[step]), calls, after))
                try:
                    action()
                    break
                except Fault:
                    assert snapshot(model) == before
                    reached += 1
        assert reached or (step, name) in {
            ("allocation", "weights"),
            ("copy", "weights"),
            ("copy", "global_prune"),
            ("record", "apply_masks"),
            ("record", "global_prune"),
        }
        usable(model, tied())


def failing(function, calls, after):
    def call(*args, **kwargs):
        last = next(calls, None) == 0
        if last and not after:
            raise Fault
        found = function(*args, **kwargs)
        if last:
            raise Fault
        return found

    return call


def test_masks_of_a_state_dict_are_all_on_or_none():
    model, state = mlp(), fp.state_dict(pruned())
    for at in range(1, 10_000):
        try:
            with FaultAtLine(at):
                fp.load_state_dict(model, state)
            break
        except Fault:
            assert set(fp.masks(model)) in ({"0.weight", "2.weight"}, set())
            model(X)
    assert set(fp.masks(model)) == {"0.weight", "2.weight"}


def test_remove_is_all_or_nothing_too():
    model = pruned(tied())
    expected, names = model(X), list(model.state_dict())
    for at in range(1, 10_000):
        try:
            with FaultAtLine(at):
                fp.remove(model)
            break
        except Fault:
            assert list(model.state_dict()) in (names, list(tied().state_dict()))
            assert torch.equal(model(X), expected)
    assert at > 20
    assert torch.equal(model(X), expected)
    assert not prune.is_pruned(model)


class HookedLazily(nn.Module):
    """Puts hooks on its layers in its first forward, as models of transformers do that hand out hidden states."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.hooked, self.kept = nn.Linear(8, 8), nn.Linear(8, 2), False, {}
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x):
        if not self.hooked:
            self.hooked = True
            for layer in (self.a, self.b):
                layer.register_forward_hook(lambda module, args, output: output + 1)
        self.kept["scaled"] = x * self.scale
        return self.b(self.a(self.kept["scaled"]))


@pytest.mark.parametrize("words", [{"granularity": "channel"}, {}])
def test_hooks_that_a_model_makes_in_its_first_forward_are_not_made_twice(words):
    torch.manual_seed(0)
    model = HookedLazily()
    fp.global_prune(model, "magnitude", 0.5, example_inputs=X, **words)
    model(X)
    assert [len(layer._forward_hooks) for layer in (model.a, model.b)] == [1, 1]

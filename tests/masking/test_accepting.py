"""A model's own ``load_state_dict`` takes pruned states, wherever it is called from."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

import torch_flowprune as fp


def net():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def pruned(fraction=0.5):
    model = net()
    fp.global_prune(model, "random", fraction, generator=torch.Generator().manual_seed(1))
    return model


def same(one, other):
    ours, theirs = fp.masks(one), fp.masks(other)
    return ours.keys() == theirs.keys() and all(torch.equal(mask, theirs[name]) for name, mask in ours.items())


STATES = {
    "ours": lambda model: model.state_dict(),
    "packed": fp.state_dict,
    "float masks": lambda model: {k: v.float() for k, v in model.state_dict().items()},
}


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("into", ["dense", "pruned", "copied", "pickled", "wrapped", "child"])
def test_a_pruned_state_is_loaded_with_its_masks(kind, into):
    source, target = pruned(), net() if into != "pruned" else pruned(0.8)
    fp.accept_masks(target)
    state = STATES[kind](source)
    if into == "copied":
        target = copy.deepcopy(target)
    elif into == "pickled":
        target = pickle.loads(pickle.dumps(target))
    before = dict(target.named_parameters())
    if into in ("wrapped", "child"):
        holder = AveragedModel(target) if into == "wrapped" else nn.Module()
        holder.module = target = holder.module if into == "wrapped" else target
        before = dict(target.named_parameters())
        state = {f"module.{name}": value for name, value in state.items()}
        holder.load_state_dict({**state, "n_averaged": torch.tensor(0)} if into == "wrapped" else state)
    else:
        target.load_state_dict(state)
    assert same(source, target)
    assert torch.equal(target(torch.ones(1, 4)), source(torch.ones(1, 4)))
    after = {id(value) for value in target.parameters()}
    assert {id(value) for value in before.values()} == after  # an optimizer that was made goes on


def test_torchs_own_states_and_states_without_masks():
    source, target = net(), net()
    prune.l1_unstructured(source[0], "weight", 0.5)
    handle = fp.accept_masks(target)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target[0].weight, source[0].weight)
    assert list(fp.masks(target)) == ["0.weight"]
    handle.remove()
    fresh = net()
    fp.accept_masks(fresh)
    fresh.load_state_dict(net().state_dict())
    assert fp.masks(fresh) == {}


def test_a_state_of_another_model_is_an_error_as_ever():
    target = net()
    fp.accept_masks(target)
    with pytest.raises((RuntimeError, ValueError)):
        target.load_state_dict(
            nn.Sequential(nn.Linear(3, 3)).state_dict() | pruned().state_dict() | {"x": torch.ones(1)}
        )

"""Held zeros are written where something may have moved them, and not after every step."""

import copy
import pickle

import pytest
import torch
from hosts import pruned, train
from torch.nn.utils import prune

import torch_flowprune as fp
from torch_flowprune.masking import optimizer_zeros

X = torch.linspace(-1, 1, 24).view(3, 8)


@pytest.fixture
def writes(monkeypatch):
    """Every tensor that is cleared."""
    seen, clear = [], optimizer_zeros.clear
    monkeypatch.setattr(optimizer_zeros, "clear", lambda value, mask: [seen.append(value), clear(value, mask)][1])
    return seen


def _held(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    fp.keep_zeros(model, optimizer)
    train(model, X, optimizer, steps=4)
    return optimizer


def _strays(model):
    return any(
        bool(model[i].weight_orig[~model[i].weight_mask].any()) for i in (0, 2) if hasattr(model[i], "weight_mask")
    )


def test_nothing_is_written_once_nothing_moves(writes):
    model = pruned()
    optimizer = _held(model)
    writes.clear()
    train(model, X, optimizer, steps=20)
    assert writes == [] and not _strays(model)
    train(model, X, optimizer, steps=100)
    assert 0 < len(writes) <= 8  # looked at once more


def _by_fp(model, _):
    fp.global_prune(model, "magnitude", 0.9)


def _by_torch(model, _):
    prune.l1_unstructured(model[0], "weight", 5)


def _in_place(model, _):
    with torch.no_grad():
        model[0].weight_mask.logical_and_(torch.rand(model[0].weight_mask.shape) < 0.5)


def _replaced(model, optimizer):
    model[0].weight = torch.nn.Parameter(torch.ones_like(model[0].weight))
    optimizer.param_groups[0]["params"][0] = model[0].weight_orig


def _loaded(model, optimizer):
    state = copy.deepcopy(optimizer.state_dict())
    for one in state["state"].values():
        one["momentum_buffer"] += 1
    optimizer.load_state_dict(state)


@pytest.mark.parametrize("change", [_by_fp, _by_torch, _in_place, _replaced, _loaded])
def test_a_change_is_seen_at_the_next_step(change):
    model = pruned()
    optimizer = _held(model)
    change(model, optimizer)
    train(model, X, optimizer, steps=1)
    assert not _strays(model)
    for target in (model[0].weight_orig, model[2].weight_orig):
        buffer = optimizer.state[target].get("momentum_buffer")
        mask = model[0].weight_mask if target is model[0].weight_orig else model[2].weight_mask
        assert buffer is None or not buffer[mask == 0].any()


class _Noisy(torch.optim.SGD):
    """Langevin's: it moves what has no gradient."""

    def step(self, closure=None):
        super().step(closure)
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter.add_(0.01 * torch.randn_like(parameter))


def test_of_an_optimizer_that_moves_zeros_they_are_written_after_every_step(writes):
    model = pruned()
    optimizer = _Noisy(model.parameters(), lr=0.1)
    fp.keep_zeros(model, optimizer)
    for _ in range(6):
        writes.clear()
        train(model, X, optimizer, steps=1)
        assert len(writes) >= 2 and not _strays(model)


def test_of_masks_made_permanent_they_are_written_after_every_step(writes):
    model = pruned()
    optimizer = _held(model)
    zero = model[0].weight_mask == 0
    fp.remove(model)
    for _ in range(6):
        writes.clear()
        train(model, X, optimizer, steps=1)
        assert writes and not model[0].weight[zero].any()


def test_a_copy_at_rest_looks_for_itself():
    model = pruned()
    optimizer = _held(model)
    other, its_optimizer = pickle.loads(pickle.dumps((model, optimizer)))
    train(other, X, its_optimizer, steps=3)
    assert not _strays(other)

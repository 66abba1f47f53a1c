"""Modules that keep something of their weights in eval mode: a mask put on or taken off reaches what they kept."""

import copy

import pytest
import torch
from torch import nn

import torch_flowprune as fp


class _KeepsAtSwitch(nn.Linear):
    """Computes what it needs once, in ``train(False)``, as modules with merged or transposed weights do."""

    kept = None

    def train(self, mode=True):
        super().train(mode)
        self.kept = None if mode else self.weight.detach() * 2
        return self

    def forward(self, x):
        return x @ (self.weight * 2 if self.training else self.kept).T


class _KeepsAtFirstUse(nn.Linear):
    """Computes it in the first forward in eval mode, and forgets in ``train()``, as LeViT's attention biases do."""

    kept = None

    def train(self, mode=True):
        super().train(mode)
        if mode:
            self.kept = None
        return self

    def forward(self, x):
        if self.training:
            return x @ self.weight.T * 2
        if self.kept is None:
            self.kept = self.weight.detach() * 2
        return x @ self.kept.T


_X = torch.eye(4)
_KINDS = [_KeepsAtSwitch, _KeepsAtFirstUse]


def _model(kind):
    torch.manual_seed(0)
    model = nn.Sequential(kind(4, 4), nn.Dropout(0.5)).eval()
    model(_X)
    return model


def _mask(model):
    return {"0.weight": torch.eye(4, dtype=torch.bool)}


def _load(model):
    other = copy.deepcopy(model)
    fp.apply_masks(other, _mask(other))
    fp.load_state_dict(model, fp.state_dict(other))


def _sync(model):
    other = copy.deepcopy(model)
    fp.apply_masks(other, _mask(other))
    fp.sync_masks(other, model)


def _by_method(model):
    fp.l1_unstructured(model[0], "weight", 8)


_CALLS = {
    "apply_masks": lambda model: fp.apply_masks(model, _mask(model)),
    "global_prune": lambda model: fp.global_prune(model, "magnitude", 0.5),
    "function": _by_method,
    "load_state_dict": _load,
    "Pruner": lambda model: fp.Pruner(model, "magnitude", 0.5).step(),
    "sync_masks": _sync,
}


@pytest.mark.parametrize("call", _CALLS)
@pytest.mark.parametrize("kind", _KINDS)
def test_a_changed_mask_reaches_what_was_kept(kind, call):
    model = _model(kind)
    _CALLS[call](model)
    assert torch.equal(model(_X), (model[0].weight * 2).detach().T)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.filterwarnings("ignore:the loss does not reach")
def test_scoring_leaves_the_model_able_to_run(kind):
    model = nn.Sequential(kind(4, 4), nn.Linear(4, 4)).eval()
    before = model(_X)
    fp.scores(model, "loss_preservation", data=(_X, torch.arange(4)), include="1")
    assert torch.equal(model(_X), before)


def test_flags_stay_module_by_module():
    model = nn.Sequential(_KeepsAtSwitch(4, 4), nn.Sequential(_KeepsAtSwitch(4, 4), nn.Dropout()))
    model.eval()
    model[1].train()
    flags = [module.training for module in model.modules()]
    fp.global_prune(model, "magnitude", 0.5)
    assert [module.training for module in model.modules()] == flags
    assert model[1][0].kept is None and model[0].kept is not None


def test_an_error_in_train_takes_the_masks_back():
    class _Fails(_KeepsAtFirstUse):
        def train(self, mode=True):
            raise RuntimeError("no modes here")

    model = nn.Sequential(_Fails(4, 4))
    model[0].training = False
    with pytest.raises(RuntimeError, match="no modes"):
        fp.apply_masks(model, {"0.weight": torch.eye(4, dtype=torch.bool)})
    assert fp.masks(model) == {} and type(model[0]) is _Fails

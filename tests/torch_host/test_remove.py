"""Row 5.10 of docs/explanation/host.md: masks made permanent on the whole model, or on nothing of it."""

from __future__ import annotations

import copy

import pytest
import torch
from hosts import mlp, pruned, snapshot
from torch import nn
from torch.nn import functional
from torch.nn.utils import prune

import torch_flowprune as fp
from torch_flowprune.masking import dense

ROWS = {
    "5.10": (
        "`prune.remove`, tensor by tensor: an error half way leaves part of the model dense",
        "handled",
        (
            "`fp.remove` first checks the whole model, without running its code. An error undoes everything; "
            "values are written last. Shared memory stays shared"
        ),
    ),
}

IMAGES = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0)) + 5


class TwoArguments(nn.Conv2d):
    def forward(self, x, style):
        return functional.conv2d(x * style, self.weight, self.bias)


class NormFirst(nn.Conv2d):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.norm = nn.BatchNorm2d(self.in_channels)

    def forward(self, x):
        return super().forward(self.norm(x))


class Noise(nn.Conv2d):
    def forward(self, x):
        return super().forward(x + torch.randn_like(x))


@pytest.mark.parametrize("remove", [fp.remove, lambda layer: prune.remove(layer, "weight")])
@pytest.mark.parametrize("kind", [TwoArguments, NormFirst, Noise])
def test_row_5_10_no_code_of_the_model_runs(kind, remove, monkeypatch):
    layer = pruned(kind(4, 4, 3))
    expected, buffers = layer.weight.detach().clone(), {name: value.clone() for name, value in layer.named_buffers()}
    state, calls = torch.get_rng_state(), []
    monkeypatch.setattr(kind, "forward", lambda *inputs: calls.append(inputs))
    remove(layer)
    assert not calls
    assert torch.equal(layer.weight, expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(buffers[name], value) for name, value in layer.named_buffers())


def test_row_5_10_what_cannot_be_made_permanent_is_found_before_anything_changes():
    model = pruned()
    model[2]._parameters["weight_orig"] = nn.Parameter(torch.ones(4, 8).to_sparse(), requires_grad=False)
    hidden = model[0].weight_orig.detach().clone()
    with pytest.raises((NotImplementedError, RuntimeError)):
        fp.remove(model)
    assert torch.equal(model[0].weight_orig, hidden)
    assert "weight_mask" in model[0]._buffers


@pytest.mark.parametrize("step", ["undress", "drop_hook", "write"])
def test_row_5_10_an_error_on_the_way_leaves_masks_and_the_values_under_them(step, monkeypatch):
    model = pruned()
    before, real, calls = snapshot(model), getattr(dense, step), []

    def fails(*inputs):
        calls.append(inputs)
        if len(calls) == (1 if step == "write" else 2):
            raise KeyboardInterrupt
        return real(*inputs)

    monkeypatch.setattr(dense, step, fails)
    with pytest.raises(KeyboardInterrupt):
        fp.remove(model)
    assert snapshot(model) == before
    monkeypatch.undo()
    expected = model(torch.ones(2, 8))
    assert torch.equal(fp.remove(model)(torch.ones(2, 8)), expected)


def test_row_5_10_a_mask_or_parameter_that_is_gone_is_named():
    model = pruned()
    del model[2]._buffers["weight_mask"]
    model[2].register_buffer("weight_mask", None)
    with pytest.raises(ValueError, match="'weight' of Linear is pruned, and its weight_orig or weight_mask is missing"):
        fp.remove(model)
    assert "weight_mask" in model[0]._buffers


def test_row_5_10_shared_memory_stays_shared():
    layer = nn.Linear(4, 4)
    layer.share_memory()
    pruned(layer)
    other = layer.weight_orig.detach()
    fp.remove(layer)
    assert layer.weight.is_shared()
    assert torch.equal(other, layer.weight)


def test_row_5_10_a_state_dict_taken_before_keeps_its_values():
    layer = pruned(nn.Linear(4, 4))
    state = layer.state_dict()
    before = copy.deepcopy(state)
    fp.remove(layer)
    assert torch.equal(state["weight_orig"], before["weight_orig"])


def test_row_5_10_a_mask_of_torch_that_scales_goes_on_scaling():
    layer = nn.Linear(4, 4)
    prune.custom_from_mask(layer, "weight", torch.full((4, 4), 0.5))
    expected = layer(torch.ones(1, 4)).detach()
    assert torch.equal(fp.remove(layer)(torch.ones(1, 4)), expected)


def test_row_5_10_tied_weights_that_torch_masked_apart_lose_what_either_lost():
    model = mlp()
    model.append(nn.Linear(8, 8))
    model[3].weight = model[0].weight
    masks = [torch.rand(8, 8) < 0.5 for _ in range(2)]
    for index, mask in zip((0, 3), masks, strict=True):
        prune.custom_from_mask(model[index], "weight", mask)
    fp.remove(model)
    assert model[3].weight is model[0].weight
    assert torch.equal(model[0].weight != 0, masks[0] & masks[1])

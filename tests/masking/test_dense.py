"""A pruned model made dense again, and zeros written without masks."""

import contextlib

import pytest
import torch
from hosts import mlp, pruned
from torch import nn
from torch.nn.utils import prune

import torch_flowprune as fp
from torch_flowprune.inputs import parameters_of
from torch_flowprune.masking import dense_copy, snapshots, write_zeros


@pytest.fixture
def walks(monkeypatch):
    """Every walk over the modules of a model, by the model."""
    seen, walk = [], nn.Module.named_modules

    def counted(module, memo=None, prefix="", remove_duplicate=True):
        if memo is None:  # not the recursion
            seen.append(module)
        return walk(module, memo, prefix, remove_duplicate)

    monkeypatch.setattr(nn.Module, "named_modules", counted)
    return seen


def test_a_copy_has_the_zeros_and_the_model_keeps_its_masks():
    model = pruned()
    dense, masks = dense_copy(model)
    assert masks.keys() == fp.masks(model).keys()
    assert not fp.masks(dense)
    assert all(torch.equal(dense.state_dict()[name] != 0, mask) for name, mask in masks.items())


def test_masks_handed_out_are_copies():
    model = pruned()
    masks = fp.masks(model)
    expected = {name: mask.clone() for name, mask in masks.items()}
    for target in parameters_of(model).values():
        if target.mask is not None:
            target.mask.zero_()
    assert all(torch.equal(masks[name], expected[name]) for name in masks)


def test_zeros_are_written_where_masks_are_false():
    model = mlp()
    model.append(nn.Linear(4, 4))
    model[3].weight = nn.Parameter(torch.randn(4, 4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    mask = torch.rand(model[0].weight.shape) < 0.5
    write_zeros(model, {"0.weight": mask})
    assert torch.equal(model[0].weight, before.pop("0.weight") * mask)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert model[0].weight.requires_grad


def test_no_call_walks_over_the_model_again_and_again(walks):
    model = mlp()
    masks = {"0.weight": torch.rand(model[0].weight.shape) < 0.5, "0.bias": torch.rand(model[0].bias.shape) < 0.5}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for call, most in (
        (lambda: fp.apply_masks(model, masks), 2),  # the parameters; and who keeps something of them in eval mode
        (lambda: fp.masks(model), 1),
        (lambda: fp.keep_zeros(model, optimizer), 1),
        (lambda: optimizer.step(), 1),
        (lambda: fp.remove(model), 1),
    ):
        walks.clear()
        call()
        assert len(walks) <= most


def test_a_module_is_remembered_once_however_much_of_it_is_pruned(monkeypatch):
    remembered, snapshot = [], snapshots._snapshot
    monkeypatch.setattr(snapshots, "_snapshot", lambda module: [remembered.append(module), snapshot(module)][1])
    model = mlp()
    masks = {name: torch.ones_like(value, dtype=torch.bool) for name, value in model[0].named_parameters("0")}
    fp.apply_masks(model, masks)
    assert remembered == [model[0]]
    remembered.clear()
    fp.remove(model)
    assert remembered == [model[0]]


def test_what_torch_prunes_on_top_is_forgotten_after_an_error():
    layer = nn.Linear(4, 4)
    fp.apply_masks(layer, {"weight": torch.ones(4, 4, dtype=torch.bool)})
    (hook,) = layer._forward_pre_hooks.values()
    with contextlib.suppress(KeyboardInterrupt), snapshots.all_or_nothing(parameters_of(layer).values()):
        prune.l1_unstructured(layer, "weight", 0.5)
        assert len(hook) == 1
        raise KeyboardInterrupt
    assert len(hook) == 0

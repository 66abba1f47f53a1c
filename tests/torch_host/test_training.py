"""Rows 5 of docs/explanation/host.md: optimizers, gradients, the order of parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from hosts import assert_in_force, mlp, pruned, train
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import torch_flowprune as fp

ROWS = {
    "5.1": (
        "an optimizer made before pruning (no fault)",
        "handled",
        "`weight_orig` is the same `Parameter`, after `remove` too",
    ),
    "5.2": (
        "`weight.grad` is None",
        "documented",
        "it is `weight_orig.grad`, exactly 0 under the mask. For regrowth, the dense gradient is that of the product",
    ),
    "5.3": (
        "momentum and weight decay move what is pruned",
        "handled",
        (
            "the weight is 0 all the same. `fp.keep_zeros(model, optimizer)` keeps parameter and optimizer state "
            "at 0, under the latest mask of each parameter, also if it is called before the first prune. It sees "
            "through wrapped optimizers. Where nothing moves the zeros, they are written after every hundredth "
            "step, and after a change of masks, parameters or states"
        ),
    ),
    "5.4": (
        "after `remove` training revives zeros",
        "handled",
        "zeros are ordinary values then. `fp.keep_zeros` still holds them, if it was called before or gets `masks`",
    ),
    "5.5": (
        "the order of parameters changes: optimizer states load into the wrong ones",
        "handled",
        (
            "the order stays, through pruning and both `remove`s. What torch's own functions moved is moved until "
            "`remove`, which restores the order of the class's constructor (if that names its parameters; else "
            "they stay at the end)"
        ),
    ),
    "5.6": (
        "rules by name miss `weight_orig`",
        "documented",
        'the names are torch\'s contract. Match `name.removesuffix("_orig")`',
    ),
    "5.7": (
        "an L2 penalty over `parameters()` counts what is pruned",
        "documented",
        "penalise `module.weight` instead",
    ),
    "5.8": (
        "scores are of the weights before the last step",
        "handled",
        "scores are those of the weights that the next forward uses",
    ),
    "5.9": (
        "checkpointing, accumulation, GradScaler, fused AdamW, hooks, siamese use (no fault)",
        "handled",
        "all work",
    ),
    "5.11": (
        "pruned under `torch.inference_mode`, a model cannot be trained: backward cannot save such masks",
        "handled",
        "masks are ordinary tensors",
    ),
}

X = torch.linspace(-1, 1, 24).view(3, 8)
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1, weight_decay=0.1),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1),
}


def test_row_5_1_an_optimizer_made_before_pruning():
    model = mlp()
    weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruned(model)
    assert model[0].weight_orig is weight
    before = model[0].weight.clone()
    train(model, X, optimizer)
    assert not torch.equal(model[0].weight, before)
    assert_in_force(model, lambda: model(X))
    assert fp.remove(model)[0].weight is weight


def test_row_5_2_gradients_are_on_weight_orig():
    model = pruned()
    model(X).sum().backward()
    with pytest.warns(UserWarning, match="attribute of a Tensor that is not a leaf"):
        assert model[0].weight.grad is None
    assert model[0].weight_orig.grad is not None
    assert not model[0].weight_orig.grad[~model[0].weight_mask].any()


def test_row_5_2_the_dense_gradient_for_regrowth_is_that_of_the_product():
    model = pruned(nn.Linear(8, 4))
    product = model.weight.detach().requires_grad_()
    nn.functional.linear(X, product, model.bias).square().sum().backward()
    assert product.grad[~model.weight_mask].any()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_row_5_3_what_moves_under_the_mask(kind):
    model = mlp()
    optimizer = OPTIMIZERS[kind](model.parameters())
    train(model, X, optimizer)
    pruned(model)
    gone = ~model[0].weight_mask
    before = model[0].weight_orig[gone].clone()
    train(model, X, optimizer)
    assert not torch.equal(model[0].weight_orig[gone], before), "as in torch: momentum and weight decay move it"
    assert not model[0].weight[gone].any(), "and the weight is 0 all the same"
    fp.keep_zeros(model, optimizer)
    train(model, X, optimizer)
    assert not model[0].weight_orig[gone].any()
    for value in optimizer.state[model[0].weight_orig].values():
        assert not isinstance(value, torch.Tensor) or value.shape != gone.shape or not value[gone].any()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_row_5_4_training_after_remove(kind):
    model = pruned()
    gone, masks = ~model[0].weight_mask, fp.masks(model)
    fp.remove(model)
    optimizer = OPTIMIZERS[kind](model.parameters())
    handle = fp.keep_zeros(model, optimizer, masks)
    train(model, X, optimizer)
    assert not model[0].weight[gone].any()
    handle.remove()
    train(model, X, optimizer)
    assert model[0].weight[gone].any(), "zeros are values: without keep_zeros training revives them"


def test_row_5_5_the_order_of_parameters():
    model, dense = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)), nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    order = [id(parameter) for parameter in model.parameters()]
    names = [name for name, _ in model.named_parameters()]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    train(model, X, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    pruned(model, include=["0.weight", "1.weight"])
    assert [id(parameter) for parameter in model.parameters()] == order
    assert [name.removesuffix("_orig") for name, _ in model.named_parameters()] == names
    late = torch.optim.Adam(model.parameters(), lr=0.1)
    late.load_state_dict(saved)
    for parameter in model.parameters():
        assert torch.equal(late.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg"])
    train(model, X, late)
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector, dense.parameters())
    assert torch.equal(dense[1].weight, model[1].weight_orig)
    fp.remove(model)
    assert [(name, id(parameter)) for name, parameter in model.named_parameters()] == list(
        zip(names, order, strict=True)
    )


def test_row_5_5_the_order_after_torch_functions():
    layer = pruned(nn.Linear(8, 8), sparsity=0.2)
    order = [id(parameter) for parameter in layer.parameters()]
    prune.l1_unstructured(layer, "weight", 0.2)
    assert [id(parameter) for parameter in layer.parameters()] == order
    prune.remove(layer, "weight")
    assert [id(parameter) for parameter in layer.parameters()] == order
    assert list(layer._parameters) == ["weight", "bias"]
    prune.l1_unstructured(layer, "weight", 0.2)
    pruned(layer, sparsity=0.4)
    assert list(layer._parameters) == ["bias", "weight_orig"], "what torch's own hook has moved stays there"


def test_row_5_6_rules_that_go_by_name():
    model = pruned()
    decayed = [name for name, _ in model.named_parameters() if name.endswith(".weight")]
    assert not decayed, "pruned parameters are called weight_orig, as torch has it"
    assert [name.removesuffix("_orig") for name, _ in model.named_parameters()] == [
        name for name, _ in mlp().named_parameters()
    ]


def test_row_5_7_a_penalty_over_parameters_counts_what_is_pruned():
    model = pruned(nn.Linear(8, 8))
    sum(parameter.square().sum() for parameter in model.parameters()).backward()
    assert model.weight_orig.grad[~model.weight_mask].all()
    model.zero_grad()
    model.weight.square().sum().backward()
    assert not model.weight_orig.grad[~model.weight_mask].any()


@pytest.mark.parametrize(
    "again", [lambda layer: fp.global_prune(layer, sparsity=0.5), lambda layer: fp.l1_unstructured(layer, "weight", 16)]
)
def test_row_5_8_scores_are_of_the_weights_as_they_are_now(again):
    layer = pruned(nn.Linear(8, 8), sparsity=0.25)
    train(layer, X)
    left, now = layer.weight_mask, nn.Linear(8, 8).weight.detach()
    with torch.no_grad():
        layer.weight_orig.copy_(now)
    again(layer)
    assert layer.weight_mask.sum() == 32
    assert now[left & ~layer.weight_mask].abs().max() <= now[layer.weight_mask].abs().min()


@pytest.mark.parametrize("reentrant", [True, False])
def test_row_5_9_gradient_checkpointing(reentrant):
    model = pruned()
    inputs = X.clone().requires_grad_()
    expected = torch.autograd.grad(model(inputs).square().sum(), list(model.parameters()))
    checkpoint(model, inputs, use_reentrant=reentrant).square().sum().backward()
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


def test_row_5_9_gradient_accumulation():
    model = pruned()
    for part in X.split(1):
        (model(part).square().sum() / 3).backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    (model(X).square().sum() / 3).backward()
    for parameter, grad in zip(model.parameters(), found, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


def test_row_5_9_grad_scaler_and_fused_optimizer():
    model = pruned()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    before = model[0].weight.clone()
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(X).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert not torch.equal(model[0].weight, before)
    assert_in_force(model, lambda: model(X))


def test_row_5_9_post_accumulate_hooks_and_siamese_use():
    model, seen = pruned(nn.Linear(8, 8)), []
    model.weight_orig.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.clone()))
    (model(X) * model(X.flip(0))).sum().backward()
    assert len(seen) == 1
    assert not seen[0][~model.weight_mask].any()


PRUNED_WITHOUT_GRAD = {
    "global": lambda layer: fp.global_prune(layer, sparsity=0.5),
    "filters": lambda layer: fp.global_prune(layer, sparsity=0.5, granularity="filter"),
    "one tensor": lambda layer: fp.l1_unstructured(layer, "weight", 0.5),
    "torch on top": lambda layer: prune.l1_unstructured(pruned(layer, 0.25), "weight", 0.25),
    "masks": lambda layer: fp.apply_masks(layer, {"weight": torch.eye(8) > 0}),
    "masks given away": lambda layer: fp.apply_masks(layer, {"weight": torch.eye(8) > 0}, copy=False),
    "loaded": lambda layer: fp.load_state_dict(layer, fp.state_dict(pruned(nn.Linear(8, 8)))),
    "averages": lambda layer: fp.sync_masks(pruned(nn.Linear(8, 8)), layer),
    "removed": lambda layer: fp.remove(pruned(layer)),
}


@pytest.mark.parametrize("how", PRUNED_WITHOUT_GRAD)
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_row_5_11_pruned_in_inference_mode_then_trained(how, mode):
    layer = nn.Linear(8, 8)
    with mode():
        PRUNED_WITHOUT_GRAD[how](layer)
    assert (layer.weight == 0).any()
    before = layer.weight.clone()
    train(layer, X)
    assert not torch.equal(layer.weight, before)

"""Rows 1 of docs/explanation/host.md: a pruned model copied, pickled, checkpointed."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from hosts import assert_in_force, masked_names, mlp, output, pruned, train
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import torch_flowprune as fp

ROWS = {
    "1.1": (
        "`copy.deepcopy` fails after pruning or after a forward with gradients",
        "handled",
        "no tensor with a graph is kept on the module. Copies are independent, and tied parameters stay tied in them",
    ),
    "1.2": (
        "EMA, SWA, `fuse_conv_bn_eval`, timm's `reparameterize_model` fail with it",
        "handled",
        (
            "all work. Masks are buffers of zeros and ones, which cannot be averaged: "
            "`AveragedModel(use_buffers=True)`, timm's `ModelEmaV2` and averages of floats keep the masks of the "
            "first round. Call `fp.sync_masks(model, average)` after each round, or pass `averages=` to the "
            "`Pruner`. Quantisation matches exact classes, so it skips masked layers, with a warning: quantise "
            "`fp.export_ready(model)`"
        ),
    ),
    "1.3": (
        "an EMA made before pruning breaks, or mixes up parameters, on its next update",
        "handled",
        (
            "these classes walk two models side by side, so both need masks: call `fp.sync_masks(model, ema)` "
            "after the prune and before the update. Without it, timm's EMA takes a mask for a weight"
        ),
    ),
    "1.4": (
        "a pickled model is 3 to 5 times the dense one; one layer carries the masks of all",
        "handled",
        "the mask takes one byte per weight, and a layer carries only its own. Loading needs this package",
    ),
    "1.5": (
        "`torch.load` refuses whole models by default",
        "documented",
        "it refuses dense models too (`weights_only=True`). Save state dicts",
    ),
    "1.6": (
        "pruned and dense checkpoints do not fit each other",
        "handled",
        (
            "`fp.load_state_dict` loads either into either. torch's own loader loads a dense one into a pruned "
            "model. `fp.state_dict(model, dense=True)` has the names of the unpruned model and zeros in the "
            "values, for strict loaders (`from_pretrained`, hubs). Save `fp.masks(model, packed=True)` beside it"
        ),
    ),
    "1.7": (
        "a dense checkpoint with `strict=False` loads the biases alone, in silence",
        "handled",
        "the weights are loaded too, under the masks",
    ),
    "1.8": (
        "after `load_state_dict` the old weights are used, and scored",
        "handled",
        "weights are computed when they are read",
    ),
    "1.9": (
        "`load_state_dict(assign=True)`",
        "handled",
        (
            "works. It replaces parameters, so create the optimizer afterwards, as for a dense model. A float "
            "mask that torch made stays float until the next prune"
        ),
    ),
    "1.10": (
        "`.to(dtype)` and `.to(device)` leave the weight behind",
        "handled",
        "the weight follows; the mask stays bool",
    ),
    "1.11": (
        "`ForkingPickler` (multiprocessing) refuses the model",
        "handled",
        "as 1.1",
    ),
    "1.12": (
        "`requires_grad_(False)` does not reach the weight",
        "handled",
        "it does, on the module and on `weight_orig`. On the masked weight itself it has no effect",
    ),
    "1.13": (
        "safetensors (no fault)",
        "handled",
        "`save_file` and `save_model` work; packed masks too",
    ),
}

X = torch.linspace(-1, 1, 24).view(3, 8)


def size_of(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.tell()


@pytest.mark.parametrize("before", ["pruning", "forward", "step"])
def test_row_1_1_deepcopy(before):
    model = pruned()
    if before == "forward":
        model(X)
    if before == "step":
        train(model, X)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(X), model(X))
    assert prune.is_pruned(twin)
    assert masked_names(twin) == masked_names(model)
    assert twin[0].weight_orig is not model[0].weight_orig
    assert twin[0].weight_mask is not model[0].weight_mask
    expected = model(X)
    train(twin, X)
    fp.global_prune(twin, sparsity=0.8)
    fp.remove(twin)
    assert torch.equal(model(X), expected), "the copy is not independent"
    assert_in_force(model, lambda: model(X))


def test_row_1_1_deepcopy_keeps_tied_parameters_tied():
    model = mlp()
    model.append(nn.Linear(8, 8))
    model[3].weight = model[0].weight
    twin = copy.deepcopy(pruned(model))
    assert twin[3].weight_orig is twin[0].weight_orig
    assert twin[3].weight_mask is twin[0].weight_mask


def test_row_1_2_ema_and_swa_of_a_pruned_model():
    timm_utils = pytest.importorskip("timm.utils")
    model = pruned(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)))
    ema = get_ema_multi_avg_fn(0.5)
    averages = [
        AveragedModel(model),
        AveragedModel(model, multi_avg_fn=ema, use_buffers=True),
        timm_utils.ModelEmaV3(model, decay=0.5),
    ]
    optimizer = train(model, X)
    for average in averages:
        update = getattr(average, "update_parameters", None) or average.update
        update(model)
        train(model, X, optimizer)
        update(model)
        inner = average.module
        assert torch.equal(inner[0].weight_mask, model[0].weight_mask)
        assert inner[0].weight_mask.dtype is torch.bool
        assert_in_force(inner.eval(), lambda: inner(X))  # noqa: B023 - called at once


def test_row_1_2_equal_averages_of_buffers_subtract_masks():
    model = pruned()
    average = AveragedModel(model, use_buffers=True)
    average.update_parameters(model)
    with pytest.raises(RuntimeError, match="with two bool tensors"):
        average.update_parameters(model)
    fp.sync_masks(model, average)
    average.update_parameters(model)
    assert_in_force(average.module, lambda: average(X))


def test_row_1_2_averages_of_buffers_in_rounds():
    model = pruned(sparsity=0.3)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    for sparsity in (0.5, 0.8):
        pruned(model, sparsity)
        fp.sync_masks(model, average)
        average.update_parameters(model)
    assert torch.equal(average.module[0].weight_mask, model[0].weight_mask)


def test_row_1_2_fuse_conv_bn():
    model = pruned(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).eval()
    images = torch.randn(2, 3, 5, 5)
    fused = torch.nn.utils.fusion.fuse_conv_bn_eval(model[0], model[1])
    torch.testing.assert_close(fused(images), model(images))
    assert torch.equal(fused.weight == 0, ~model[0].weight_mask)


def test_row_1_2_timm_reparameterize():
    pytest.importorskip("timm")
    from timm.models.byobnet import MobileOneBlock
    from timm.utils.model import reparameterize_model

    block = nn.Sequential(MobileOneBlock(4, 4, 3, num_conv_branches=2)).eval()
    pruned(block, include=nn.Conv2d)
    images = torch.randn(2, 4, 6, 6)
    folded = reparameterize_model(block)
    assert not masked_names(folded)
    torch.testing.assert_close(folded(images), block(images), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:torch.*quantiz.* deprecated")
def test_row_1_2_quantize_dynamic_wants_remove_first():
    model = pruned()
    quantize = torch.ao.quantization.quantize_dynamic
    with pytest.warns(UserWarning, match=r"quantise fp.export_ready\(model\)"):
        quantized = quantize(model)
    assert not any("quantized" in type(module).__module__ for module in quantized.modules()), "it goes by exact class"
    assert any("quantized" in type(module).__module__ for module in quantize(fp.remove(model)).modules())


def test_row_1_3_averagedmodel_made_before_pruning():
    model = mlp()
    average = AveragedModel(model, use_buffers=False)
    average.update_parameters(model)
    pruned(model)
    fp.sync_masks(model, average)
    train(model, X)
    average.update_parameters(model)
    assert_in_force(average.module, lambda: average(X))


def test_row_1_3_timm_ema_made_before_pruning():
    timm_utils = pytest.importorskip("timm.utils")
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    average = timm_utils.ModelEmaV3(model, decay=0.5)
    late = copy.deepcopy(average)
    pruned(model)
    fp.sync_masks(model, average)
    train(model, X)
    start = average.module[1].weight_orig.clone()
    average.update(model)
    torch.testing.assert_close(average.module[1].weight_orig, (start + model[1].weight_orig) / 2)
    late.update(model)  # without the masks: timm walks two state dicts side by side, and takes a mask for a weight
    assert not torch.allclose(late.module[1].weight, (start + model[1].weight_orig) / 2)


def test_row_1_4_whole_model_pickle():
    model = pruned(nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128)))
    dense = size_of(nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128)))
    for _ in range(3):
        fp.global_prune(model, amount=0.1)
    assert size_of(model) < 1.3 * dense, "one byte a weight for the mask"
    assert size_of(model[0]) < 0.7 * dense, "a layer carries its own mask alone"
    inputs = torch.randn(2, 128)
    for back in (pickle.loads(pickle.dumps(model)), torch.load(io.BytesIO(_saved(model)), weights_only=False)):
        assert torch.equal(back(inputs), model(inputs))
        assert prune.is_pruned(back)
        assert_in_force(back, lambda: back(inputs))  # noqa: B023 - called at once
        assert isinstance(fp.remove(back)[0].weight, nn.Parameter)


def _saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_row_1_5_torch_load_wants_state_dicts():
    model = pruned()
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(io.BytesIO(_saved(model)))
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(io.BytesIO(_saved(mlp())))  # dense models too
    fp.load_state_dict(fresh := mlp(), torch.load(io.BytesIO(_saved(fp.state_dict(model)))))
    assert torch.equal(fresh(X), model(X))


def test_row_1_6_pruned_and_dense_checkpoints():
    model, dense = pruned(), mlp()
    with pytest.raises(RuntimeError, match="Missing key"):
        mlp().load_state_dict(model.state_dict())  # torch's own loader into a dense model: as with torch's masks
    fp.load_state_dict(fresh := mlp(), model.state_dict())
    assert torch.equal(fresh(X), model(X))
    model.load_state_dict(dense.state_dict())  # the other way torch's own loader works too
    assert torch.equal(model[0].weight, dense[0].weight * model[0].weight_mask)
    removed = fp.remove(copy.deepcopy(model)).state_dict()
    dense.load_state_dict(removed)
    assert torch.equal(dense(X), model(X))


def test_row_1_7_dense_checkpoint_into_a_pruned_model_loads_weights():
    model, dense = pruned(), mlp()
    found = model.load_state_dict(dense.state_dict(), strict=False)
    assert not found.missing_keys
    assert not found.unexpected_keys
    assert torch.equal(model[0].weight_orig, dense[0].weight)


def test_row_1_8_weights_are_fresh_after_load_state_dict():
    model, other = pruned(), pruned()
    model(X)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model[0].weight, other[0].weight)
    fp.global_prune(model, sparsity=0.75)
    fp.global_prune(other, sparsity=0.75)
    assert torch.equal(model[0].weight_mask, other[0].weight_mask), "scored by the loaded weights"


def test_row_1_9_load_with_assign():
    model, other = pruned(), pruned()
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
    assert torch.equal(model(X), other(X))
    train(model, X)
    assert_in_force(model, lambda: model(X))


def test_row_1_10_to_dtype_and_device():
    model = pruned().to(torch.float64)
    assert {model[0].weight.dtype, model[0].weight_orig.dtype} == {torch.float64}
    assert model[0].weight_mask.dtype is torch.bool
    assert model(X.double()).dtype is torch.float64
    meta = copy.deepcopy(model).to("meta")
    assert meta[0].weight.is_meta
    assert meta[0].weight_mask.is_meta


def test_row_1_11_forking_pickler():
    from multiprocessing.reduction import ForkingPickler

    model = pruned()
    model(X)
    back = pickle.loads(bytes(ForkingPickler.dumps(model)))
    assert torch.equal(back(X), model(X))


def test_row_1_12_requires_grad():
    model = pruned()
    assert model[0].weight.requires_grad
    model.requires_grad_(False)
    assert not model[0].weight.requires_grad
    assert not output(model, X).requires_grad


def test_row_1_13_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = pruned()
    safetensors.save_file(model.state_dict(), tmp_path / "file.safetensors")
    safetensors.save_model(model, tmp_path / "model.safetensors")
    safetensors.save_file(fp.state_dict(model), tmp_path / "packed.safetensors")
    for name in ("file", "model", "packed"):
        fp.load_state_dict(fresh := mlp(), safetensors.load_file(tmp_path / f"{name}.safetensors"))
        assert torch.equal(fresh(X), model(X))
    safetensors.load_model(other := pruned(mlp()), tmp_path / "model.safetensors")
    assert torch.equal(other(X), model(X))

"""Rows 8 of docs/explanation/host.md, what can be counted exactly; seconds and peaks are in benchmarks/."""

from __future__ import annotations

import torch
from hosts import hooks_of, pruned
from torch import nn
from torch.nn.utils import prune

import torch_flowprune as fp

ROWS = {
    "8.1": (
        "3 W after one global call, 4 W after two",
        "handled",
        "W/4, after several calls too",
    ),
    "8.2": (
        "a float copy of the mask is kept for backward",
        "handled",
        "the bool mask itself is kept. The layer that uses the masked product keeps it, as it keeps any input",
    ),
    "8.3": (
        "global selection concatenates, sorts and indexes: 12 W at its peak",
        "handled",
        "exactly the k lowest are selected without concatenating. Seconds and peaks are in `benchmarks/`",
    ),
}

W = 64 * 64 * 4


def tensors_of(value, seen):
    """Every tensor that an object keeps alive, once."""
    if isinstance(value, torch.Tensor):
        seen[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    elif isinstance(value, dict):
        for item in value.values():
            tensors_of(item, seen)
    elif isinstance(value, (list, tuple)):
        for item in value:
            tensors_of(item, seen)
    elif isinstance(value, (nn.Module, prune.BasePruningMethod)):
        tensors_of(vars(value), seen)
    return seen


def size(module):
    return sum(tensors_of(module, {}).values())


def test_row_8_1_a_mask_is_a_byte_a_weight_however_often_pruned():
    layer = nn.Linear(64, 64, bias=False)
    assert size(layer) == W
    for sparsity in (0.2, 0.4, 0.6):
        pruned(layer, sparsity)
        layer(torch.ones(1, 64))
        fp.l1_unstructured(layer, "weight", 0.1)
        assert size(layer) == W + W // 4
    assert hooks_of(layer)
    assert size(fp.remove(layer)) == W
    theirs = nn.Linear(64, 64, bias=False)
    for _ in range(2):
        prune.global_unstructured([(theirs, "weight")], prune.L1Unstructured, amount=0.2)
    assert size(theirs) >= 4 * W, "what torch's own keep"


def test_row_8_1_torch_functions_on_top_keep_no_masks_either():
    layer = pruned(nn.Linear(64, 64, bias=False), 0.2)
    for _ in range(3):
        prune.global_unstructured([(layer, "weight")], prune.L1Unstructured, amount=0.1)
        assert size(layer) == W + W // 4


def test_row_8_2_backward_keeps_the_mask_and_no_float_copy_of_it():
    layer, kept = pruned(nn.Linear(64, 64, bias=False)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer.weight  # noqa: B018 - reading computes
    assert sum(tensor.nbytes for tensor in kept) == W // 4
    assert kept[0].data_ptr() == layer.weight_mask.data_ptr()


def test_row_8_3_the_selection_is_exact_over_many_layers_without_concatenating():
    model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(4)])
    largest, real = [0], torch.cat

    def cat(tensors, *args, **kwargs):
        found = real(tensors, *args, **kwargs)
        largest[0] = max(largest[0], found.numel())
        return found

    every = real([parameter.detach().abs().flatten() for parameter in model.parameters()])
    report = fp.global_prune(model, sparsity=0.3)
    assert report.pruned == round(0.3 * every.numel())
    kept = real([layer.weight_mask.flatten() for layer in model])
    assert every[~kept].max() <= every[kept].min()

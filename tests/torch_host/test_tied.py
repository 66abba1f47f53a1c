"""Rows 4 of docs/explanation/host.md: tied and repeated parameters."""

from __future__ import annotations

import pytest
import torch
from hosts import assert_in_force, train
from torch import nn
from torch.nn.utils import prune

import torch_flowprune as fp

ROWS = {
    "4.1": (
        "tied weights both listed count twice and get two masks",
        "handled",
        "one parameter, one mask",
    ),
    "4.2": (
        "with random scores more is pruned than was asked",
        "handled",
        "as 4.1",
    ),
    "4.3": (
        "only one owner listed: the other runs dense",
        "handled",
        (
            "all owners in the model are masked. A function of one module (`l1_unstructured(layer, ...)`) does "
            "not know the others: `fp.apply_masks(model, fp.masks(model))`"
        ),
    ),
    "4.4": (
        "a pair listed twice is pruned twice",
        "handled",
        "it counts once",
    ),
    "4.5": (
        "only the name that comes first in the model counts",
        "handled",
        (
            "`include=`, `exclude=`, masks, scores and stored states accept each of a tied weight's names "
            "(`lm_head` for the embedding's). Of two masks, what either removes is removed"
        ),
    ),
}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 8)
        self.decoder = nn.Linear(8, 6, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens):
        return self.decoder(self.embedding(tokens))


TOKENS = torch.tensor([[0, 3, 5]])


@pytest.mark.parametrize("method", ["l1", "random"])
def test_row_4_1_and_4_2_tied_weights_count_once_and_share_one_mask(method):
    model = Tied()
    pairs = [(model.embedding, "weight"), (model.decoder, "weight")]
    report = fp.global_prune(model, method, amount=11, parameters=pairs)
    assert (report.units, report.pruned) == (48, 11)
    assert model.embedding.weight_mask is model.decoder.weight_mask
    assert (model.embedding.weight == 0).sum() == 11
    train(model, TOKENS)
    assert_in_force(model, lambda: model(TOKENS))
    fp.remove(model)
    assert model.embedding.weight is model.decoder.weight
    assert (model.embedding.weight == 0).sum() == 11


@pytest.mark.parametrize("listed", ["embedding", "decoder", None])
def test_row_4_3_one_owner_listed_masks_all(listed):
    model = Tied()
    fp.global_prune(model, sparsity=0.5, parameters=listed and [(getattr(model, listed), "weight")])
    assert model.embedding.weight_mask is model.decoder.weight_mask
    assert len(list(model.parameters())) == 1
    assert_in_force(model, lambda: model(TOKENS))


def test_row_4_3_a_function_of_one_module_knows_only_that_module():
    model = Tied()
    fp.l1_unstructured(model.decoder, "weight", 0.5)
    assert not prune.is_pruned(model.embedding), "as in torch: it is not told about the model"
    fp.apply_masks(model, fp.masks(model))
    assert model.embedding.weight_mask is model.decoder.weight_mask


def test_row_4_4_a_pair_listed_twice_counts_once():
    model = nn.Sequential(nn.Linear(10, 10))
    model.append(model[0])
    report = fp.global_prune(model, "random", sparsity=0.5, parameters=[(model[0], "weight"), (model[1], "weight")] * 2)
    assert (report.units, report.pruned) == (100, 50)
    assert (model[0].weight == 0).sum() == 50


class Heads(nn.Module):
    """As language models have it: the head's weight is the embedding's, and pruned by default as the head's."""

    def __init__(self):
        super().__init__()
        self.wte, self.fc = nn.Embedding(6, 8), nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 6, bias=False)
        self.lm_head.weight = self.wte.weight


@pytest.mark.parametrize("name", ["lm_head", "lm_head.weight", "wte", "wte.weight", "lm_*"])
def test_row_4_5_picked_by_any_name(name):
    assert [layer.name for layer in fp.global_prune(Heads(), exclude=name, sparsity=0.5).layers] == ["fc.weight"]
    assert [layer.name for layer in fp.global_prune(Heads(), include=name, sparsity=0.5).layers] == ["wte.weight"]


@pytest.mark.parametrize("name", ["lm_head.weight", "wte.weight"])
def test_row_4_5_masks_and_scores_by_any_name(name):
    mask = torch.arange(48).view(6, 8) % 3 != 0
    for packed in (False, True):
        fp.apply_masks(source := Heads(), {"wte.weight": mask})
        fp.apply_masks(model := Heads(), {name: fp.masks(source, packed=packed)["wte.weight"]})
        assert torch.equal(model.lm_head.weight_mask, mask)
        assert model.wte.weight_mask is model.lm_head.weight_mask
    scores = torch.arange(48.0).view(6, 8)
    report = fp.global_prune(model := Heads(), scores={name: scores}, sparsity=0.5)
    assert [layer.name for layer in report.layers] == ["wte.weight"]
    assert torch.equal(model.wte.weight_mask, scores >= 24)
    optimizer = torch.optim.SGD(fp.remove(model).parameters(), lr=0.1, weight_decay=0.1)
    fp.keep_zeros(model, optimizer, {name: mask})
    assert torch.equal(model.lm_head.weight == 0, ~(mask & (scores >= 24)))


def test_row_4_5_two_masks_of_one_weight_are_one():
    first, second = torch.ones(6, 8).bool(), torch.ones(6, 8).bool()
    first[0], second[1] = False, False
    fp.apply_masks(model := Heads(), {"wte.weight": first, "lm_head.weight": second})
    assert torch.equal(model.wte.weight_mask, first & second)


@pytest.mark.parametrize("owners", [("wte",), ("lm_head",), ("wte", "lm_head")])
def test_row_4_5_a_mask_stored_under_any_name_is_loaded(owners):
    source = Heads()
    for owner in owners:
        prune.random_unstructured(getattr(source, owner), "weight", 0.5)
    expected = torch.ones(6, 8).bool()
    for owner in owners:
        expected &= getattr(source, owner).weight_mask.bool()
    fp.load_state_dict(model := Heads(), source.state_dict())
    assert torch.equal(model.wte.weight_mask, expected)
    assert model.wte.weight_mask is model.lm_head.weight_mask
    assert torch.equal(
        model.wte.weight_orig, source.lm_head.weight_orig if "lm_head" in owners else source.wte.weight_orig
    )


@pytest.mark.parametrize("left_out", ["wte", "lm_head"])
def test_row_4_5_a_state_with_a_tied_weight_once_is_loaded(left_out):
    """As safetensors' ``save_model`` writes it."""
    fp.global_prune(source := Heads(), sparsity=0.5)
    state = {name: value for name, value in fp.state_dict(source).items() if not name.startswith(left_out)}
    fp.load_state_dict(model := Heads(), state)
    assert torch.equal(model.lm_head.weight, source.lm_head.weight)
    assert torch.equal(model.wte.weight, source.wte.weight)


def test_row_4_5_a_module_held_twice_goes_by_both_names():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    model["b"] = model["a"]
    assert [layer.name for layer in fp.global_prune(model, exclude="b", sparsity=0.5).layers] == ["c.weight"]
    fp.apply_masks(model, {"b.weight": torch.eye(4).bool()})
    assert fp.masks(model).keys() == {"a.weight", "c.weight"}
    fp.load_state_dict(other := nn.ModuleDict({"a": nn.Linear(4, 4), "c": nn.Linear(4, 4)}), {
        name: value for name, value in model.state_dict().items() if not name.startswith("b")
    })  # fmt: skip
    assert torch.equal(other["a"].weight, model["b"].weight)


def test_row_4_5_a_model_in_which_a_child_knows_its_parent():
    model = nn.Sequential(nn.Linear(4, 4), nn.ModuleList())
    model[1].append(model)
    assert [layer.name for layer in fp.global_prune(model, sparsity=0.5).layers] == ["0.weight"]

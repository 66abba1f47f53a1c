"""Rows 4 of docs/explanation/host.md: tied and repeated parameters."""

from __future__ import annotations

import pytest
import torch
from hosts import assert_in_force, train
from torch import nn
from torch.nn.utils import prune

import torch_flowprune as fp


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

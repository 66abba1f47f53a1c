"""Rows 3.13 and 3.14 of docs/explanation/host.md: modules, dtypes and parameters off the beaten track."""

from __future__ import annotations

import pytest
import torch
from hosts import assert_in_force, output, pruned, train
from torch import nn

import torch_flowprune as fp

X = torch.linspace(-1, 1, 24).view(3, 8)
IMAGES = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


ODD = {
    "embedding": (lambda: nn.Embedding(8, 8), torch.tensor([1, 2])),
    "max_norm": (lambda: nn.Embedding(8, 8, max_norm=1.0), torch.tensor([1, 2])),
    "embedding bag": (lambda: nn.EmbeddingBag(8, 8), torch.tensor([[1, 2]])),
    "batch norm": (lambda: nn.BatchNorm1d(8), X),
    "layer norm": (lambda: nn.LayerNorm(8), X),
    "group norm": (lambda: nn.GroupNorm(2, 4), IMAGES),
    "prelu": (lambda: nn.PReLU(8), X),
    "bilinear": (lambda: Twice(nn.Bilinear(8, 8, 2)), X),
    "transposed": (lambda: nn.ConvTranspose2d(4, 4, 3), IMAGES),
    "grouped": (lambda: nn.Conv2d(4, 4, 3, groups=2, padding_mode="reflect", padding=1), IMAGES),
    "list": (lambda: Listed(), X),
}


class Twice(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x, x)


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.list = nn.ParameterList([torch.randn(8, 8), torch.randn(8, 8)])
        self.dict = nn.ParameterDict({"a": torch.randn(8, 8)})

    def forward(self, x):
        return x @ self.list[0] @ self.list[1] @ self.dict["a"]


@pytest.mark.parametrize("case", ODD)
@pytest.mark.filterwarnings("ignore:nothing is left of bias", "ignore:.* exactly the score of the last")
def test_row_3_13_odd_modules(case):
    make, inputs = ODD[case]
    model = make()
    pruned(model, include="*")
    train(model, inputs)
    if case != "max_norm":  # renormalises the masked weight in place: nan under the mask would count into the norm
        assert_in_force(model, lambda: output(model, inputs))
    model.eval()
    expected = output(model, inputs)
    torch.testing.assert_close(output(fp.remove(model), inputs), expected)


def test_row_3_13_sparse_gradients():
    layer = pruned(nn.Embedding(8, 8, sparse=True), include="weight")
    train(layer, torch.tensor([1, 2]), torch.optim.SparseAdam(layer.parameters()))
    grad = layer.weight_orig.grad
    assert grad.is_sparse
    assert not grad.to_dense()[~layer.weight_mask].any()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int8, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("prune_half", [lambda layer: fp.magnitude_unstructured(layer, "weight", 0.5), pruned])
def test_row_3_13_dtypes(dtype, prune_half):
    layer = nn.Linear(8, 8, bias=False)
    layer.weight = nn.Parameter((torch.randn(8, 8) * 50).to(dtype), requires_grad=dtype != torch.int8)
    prune_half(layer)
    assert layer.weight.dtype is dtype
    assert (layer.weight == 0)[~layer.weight_mask].all()
    assert layer.weight_mask.sum() == 32


def test_row_3_13_a_subclass_of_parameter():
    class Own(nn.Parameter):
        pass

    layer = nn.Linear(8, 8)
    layer.weight = Own(layer.weight.detach())
    pruned(layer)
    train(layer, X)
    assert type(layer.weight_orig) is Own
    assert type(fp.remove(layer).weight) is Own


def selects_fp8():
    try:
        torch.where(torch.tensor([True]), torch.ones(1).to(torch.float8_e4m3fn), 0)
    except RuntimeError:
        return False
    return True


@pytest.mark.skipif(not selects_fp8(), reason="torch.where of this torch does not take fp8 on the CPU (seen with 2.6)")
def test_row_3_14_fp8():
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    fp.magnitude_unstructured(layer, "weight", 0.5)
    assert layer.weight_mask.sum() == 32
    assert layer.weight.dtype is torch.float8_e4m3fn
    assert not layer.weight.float()[~layer.weight_mask].any()

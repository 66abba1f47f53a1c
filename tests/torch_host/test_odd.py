"""Rows 3.13, 3.14 and others of docs/explanation/host.md: modules, dtypes, parameters off the beaten track."""

from __future__ import annotations

import pytest
import torch
from hosts import assert_in_force, output, pruned, train
from torch import nn
from torch.nn.utils import prune

import torch_flowprune as fp

ROWS = {
    "3.13": (
        (
            "embeddings (sparse gradients, `max_norm`), norms, PReLU, bilinear, transposed, parameter lists and "
            "subclasses, complex, int8 (no fault)"
        ),
        "handled",
        "all work. With sparse gradients the mask is multiplied, so an infinity under it would give nan",
    ),
    "3.14": (
        "fp8 has no `topk`",
        "handled",
        "scores are float32. torch's own methods on top of a mask work as well",
    ),
}

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


@pytest.mark.skipif(not selects_fp8(), reason="torch.where of this torch does not take fp8 on the CPU (seen with 2.6)")
@pytest.mark.parametrize(
    "method",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", 16),
        lambda layer: prune.random_unstructured(layer, "weight", 16),
        lambda layer: prune.ln_structured(layer, "weight", 2, 2, 0),
        lambda layer: prune.random_structured(layer, "weight", 2, 0),
        lambda layer: prune.custom_from_mask(layer, "weight", torch.eye(8) == 0),
    ],
    ids=["l1", "random", "ln_structured", "random_structured", "custom"],
)
def test_row_3_14_methods_of_torch_on_top_of_masked_fp8(method):
    """torch's own fail on a dense weight of this kind: there is no order, no norm and no random number for it."""
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    fp.apply_masks(layer, {"weight": torch.ones(8, 8, dtype=torch.bool)})
    method(layer)
    assert (~layer.weight_mask).sum() in (8, 16)
    assert layer.weight.dtype is torch.float8_e4m3fn
    assert not layer.weight.float()[~layer.weight_mask].any()


def test_row_3_13_an_attribute_called_sparse_is_the_users_own():
    class Own(nn.Linear):
        sparse = True

    layer = pruned(Own(8, 8))
    with torch.no_grad():
        layer.weight_orig[~layer.weight_mask] = torch.inf
    assert layer.weight.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float64])
def test_row_3_13_methods_of_torch_on_top_of_a_masked_weight(dtype):
    layer = nn.Linear(4, 4, dtype=dtype)
    fp.magnitude_unstructured(layer, "weight", 4)
    prune.custom_from_mask(layer, "weight", torch.eye(4) == 0)
    assert layer.weight_mask.sum() in range(8, 13)
    assert (layer.weight == 0).sum() == 16 - layer.weight_mask.sum()
    assert layer.weight.dtype is dtype


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_row_3_13_a_sparse_weight_is_refused(layout):
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(getattr(layer.weight.detach(), layout)(), requires_grad=False)
    for attempt in (
        lambda: pruned(layer),
        lambda: fp.apply_masks(layer, {"weight": torch.ones(8, 8, dtype=torch.bool)}),
        lambda: fp.l1_unstructured(layer, "weight", 0.5),
    ):
        with pytest.raises(ValueError, match=r"'weight' is a sparse tensor \(torch.sparse_.*\.to_dense"):
            attempt()
    assert list(layer._buffers) == []


def test_row_3_13_a_packed_mask_of_one_element():
    layer, other = nn.PReLU(), nn.PReLU()
    for kept in (True, False):
        fp.apply_masks(layer, {"weight": torch.tensor([kept])})
        fp.apply_masks(other, fp.masks(layer, packed=True))
        assert other.weight_mask.tolist() == [kept]


def test_row_3_13_masks_made_in_inference_mode_can_be_trained_with():
    layers = [nn.Linear(8, 8), nn.Linear(8, 8)]
    with torch.inference_mode():
        pruned(layers[0])
        fp.apply_masks(layers[1], {"weight": torch.eye(8) == 0}, copy=False)
    for layer in layers:
        train(layer, X)
        assert_in_force(layer, lambda: layer(X))  # noqa: B023 - called at once


GIVEN = {"shape": lambda: torch.ones(1, 1), "sparse": lambda: torch.ones(8, 8).to_sparse(), "none": lambda: None}


@pytest.mark.parametrize("case", GIVEN)
def test_row_2_7_what_does_not_fit_the_mask_is_refused_at_once(case):
    layer = pruned(nn.Linear(8, 8))
    expected, value = layer.weight.detach(), GIVEN[case]()
    parameter = None if value is None else nn.Parameter(value, requires_grad=False)
    with pytest.raises(ValueError, match="'weight' is pruned, "):
        layer.register_parameter("weight", parameter)
    if parameter is not None:
        with pytest.raises(ValueError, match="fp.remove first"):
            layer.weight = parameter
    assert torch.equal(layer.weight, expected)


def test_row_3_13_methods_of_torch_on_top_of_a_masked_subclass():
    layer = nn.Linear(4, 4)
    layer.weight = Kind(layer.weight.detach())
    fp.magnitude_unstructured(layer, "weight", 4)
    prune.custom_from_mask(layer, "weight", torch.eye(4) == 0)
    assert not layer.weight.detach()[torch.eye(4) == 1].any()
    assert type(fp.remove(layer).weight) is Kind


class Kind(nn.Parameter):
    """A parameter whose values keep its class in every operation."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        found = super().__torch_function__(func, types, args, kwargs or {})
        return found.as_subclass(cls) if type(found) is torch.Tensor else found

"""Rows 3 and 4 of docs/host.md: parametrized, odd and tied modules."""

from __future__ import annotations

import pytest
import torch
from hosts import assert_in_force, hooks_of, masked_names, mlp, output, pruned, snapshot, train
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import torch_flowprune as fp

X = torch.linspace(-1, 1, 24).view(3, 8)
IMAGES = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))

old_weight_norm = pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
stays_dense = pytest.mark.filterwarnings("ignore:0.weight is .* stays dense")


class Computed(nn.Module):
    """A weight that is a property of the class itself."""

    def __init__(self):
        super().__init__()
        self.root = nn.Parameter(torch.randn(8, 8))

    @property
    def weight(self):
        return 2 * self.root


def with_buffer(layer):
    del layer._parameters["weight"]
    layer.register_buffer("weight", torch.ones(8, 8))
    return layer


REWRITTEN = {
    "weight_norm": (parametrizations.weight_norm, "remove_parametrizations first"),
    "spectral_norm": (parametrizations.spectral_norm, "remove_parametrizations first"),
    "orthogonal": (parametrizations.orthogonal, "remove_parametrizations first"),
    "old weight_norm": (lambda layer: nn.utils.weight_norm(layer), "torch.nn.utils.remove_weight_norm first"),
    "old spectral_norm": (nn.utils.spectral_norm, "torch.nn.utils.remove_spectral_norm first"),
    "property": (lambda layer: Computed(), r"no parameter 'weight'; its parameters are \['root'\]"),
    "buffer": (with_buffer, "is a buffer"),
}


@pytest.mark.parametrize("case", REWRITTEN)
@old_weight_norm
@stays_dense
def test_row_3_1_and_3_2_a_weight_that_is_no_parameter_is_refused_before_anything_is_touched(case):
    make, text = REWRITTEN[case]
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1] = make(model[1])
    before = snapshot(model)
    for attempt in (
        lambda: fp.l1_unstructured(model[1], "weight", 0.5),
        lambda: fp.random_structured(model[1], "weight", 0.5),
        lambda: fp.global_prune(model, sparsity=0.5, parameters=[(model[0], "weight"), (model[1], "weight")]),
    ):
        with pytest.raises(ValueError, match=text):
            attempt()
        assert snapshot(model) == before


@old_weight_norm
@pytest.mark.parametrize("case", [case for case in REWRITTEN if "norm" in case or case == "orthogonal"])
def test_row_3_1_left_dense_by_default_with_a_warning(case):
    model = mlp()
    REWRITTEN[case][0](model[0])
    with pytest.warns(UserWarning, match=r"0.weight is .* first; it stays dense"):
        report = fp.global_prune(model, sparsity=0.5)
    assert [layer.name for layer in report.layers] == ["2.weight"]


def test_row_3_1_after_removing_the_parametrization():
    model = mlp()
    parametrizations.weight_norm(model[0])
    parametrize.remove_parametrizations(model[0], "weight")
    assert masked_names(pruned(model)) == {"0.weight", "2.weight"}


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.orthogonal])
def test_row_3_3_originals_of_a_parametrization(norm):
    model = nn.Sequential(norm(nn.Linear(8, 8)))
    inner = model[0].parametrizations.weight
    name = "original1" if hasattr(inner, "original1") else "original"
    before = snapshot(model)
    for attempt in (lambda: fp.l1_unstructured(inner, name, 0.5), lambda: fp.global_prune(model, sparsity=0.5, include=f"*{name}")):
        with pytest.raises(ValueError, match="a mask on it would not be one on the weight"):
            attempt()
        assert snapshot(model) == before


@old_weight_norm
def test_row_3_4_parametrizing_a_pruned_layer():
    model = pruned()
    expected, before = model(X), snapshot(model)
    with pytest.raises(ValueError, match="does not have a parameter"):  # torch's own text
        parametrizations.spectral_norm(model[0])
    with pytest.raises(KeyError):
        nn.utils.weight_norm(model[0])
    assert snapshot(model) == before
    assert torch.equal(model(X), expected)
    parametrizations.weight_norm(fp.remove(model)[0])


@old_weight_norm
def test_row_3_5_originals_of_a_legacy_hook():
    layer = nn.utils.weight_norm(nn.Linear(8, 8))
    before = snapshot(layer)
    for name in ("weight_v", "weight_g"):
        with pytest.raises(ValueError, match="rewritten by WeightNorm before every forward: torch.nn.utils.remove_weight_norm first"):
            fp.l1_unstructured(layer, name, 0.5)
        assert snapshot(layer) == before


def test_row_3_6_hooks_keep_their_order():
    layer = nn.Linear(8, 8)
    fp.l1_unstructured(layer, "weight", 0.2)
    layer.register_forward_pre_hook(user := lambda module, inputs: None)
    fp.l1_unstructured(layer, "weight", 0.2)
    fp.global_prune(layer, sparsity=0.5)
    (first, second) = layer._forward_pre_hooks.values()
    assert first is hooks_of(layer)[0]
    assert second is user


def kernels_used(model, images):
    """The kernel of every convolution that runs."""
    found, real = [], torch.nn.functional.conv2d

    class Record(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is real:
                found.append(args[1])
            return func(*args, **(kwargs or {}))

    with Record():
        model(images)
    return found


@pytest.mark.parametrize("name", ["ScaledStdConv2d", "StdConv2d"])
def test_row_3_7_weight_standardisation(name):
    layers = pytest.importorskip("timm.layers")
    model = pruned(nn.Sequential(getattr(layers, name)(4, 4, 3)))
    train(model, IMAGES)
    (kernel,) = kernels_used(model, IMAGES)
    assert torch.equal(kernel == 0, ~model[0].weight_mask)
    before = snapshot(model)
    with pytest.raises(ValueError, match="standardises its weight before use.*prune whole filters"):
        fp.remove(model)
    with pytest.raises(ValueError, match="standardises its weight before use"):
        prune.remove(model[0], "weight")
    assert snapshot(model) == before


def test_row_3_7_filters_of_a_standardised_convolution_can_be_removed():
    layers = pytest.importorskip("timm.layers")
    model = pruned(nn.Sequential(layers.ScaledStdConv2d(4, 4, 3, bias=False)), granularity="filter")
    expected = model(IMAGES)
    torch.testing.assert_close(fp.remove(model)(IMAGES), expected)


def test_row_3_8_lazy_modules():
    layer = nn.LazyLinear(4)
    before = list(layer.__dict__)
    for attempt in (lambda: fp.l1_unstructured(layer, "weight", 0.5), lambda: fp.global_prune(layer, sparsity=0.5)):
        with pytest.raises(ValueError, match="run one batch through the model first"):
            attempt()
    assert list(layer.__dict__) == before
    layer(X)
    assert pruned(layer).weight_mask.sum() == 16


def test_row_3_9_no_bias():
    layer = nn.Linear(8, 8, bias=False)
    before = snapshot(layer)
    for attempt in (lambda: fp.l1_unstructured(layer, "bias", 0.5), lambda: fp.global_prune(layer, sparsity=0.5, parameters=[(layer, "bias")])):
        with pytest.raises(ValueError, match=r"has no 'bias': it is None \(made with bias=False\?\); its parameters are \['weight'\]"):
            attempt()
    assert snapshot(layer) == before
    layer(X)


def test_row_3_10_a_buffer_with_the_name_of_a_mask():
    layer = nn.Linear(8, 8)
    layer.register_buffer("weight_mask", torch.ones(3))
    before = snapshot(layer)
    for attempt in (lambda: fp.l1_unstructured(layer, "weight", 0.5), lambda: pruned(layer)):
        with pytest.raises(ValueError, match="already has a buffer 'weight_mask' of its own, the name a mask needs: rename it"):
            attempt()
    assert snapshot(layer) == before


class Fixed(prune.BasePruningMethod):
    """A user's method on torch's base class that returns what it is told to."""

    PRUNING_TYPE = "global"

    def __init__(self, mask):
        self.mask = mask

    def compute_mask(self, t, default_mask):
        return self.mask


@pytest.mark.parametrize("shape", [(3,), (8, 1), (8, 8, 1)])
def test_row_3_11_masks_of_another_shape(shape):
    layer = pruned(nn.Linear(8, 8))
    before = snapshot(layer)
    with pytest.raises(ValueError, match=r"should have shape \(8, 8\)"):
        fp.apply_masks(layer, {"weight": torch.ones(shape, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"expected one score a unit, shape \(64,\)"):
        fp.global_prune(layer, lambda theta: theta.expand(-1, 2), sparsity=0.6)
    assert snapshot(layer) == before


@pytest.mark.parametrize("shape", [(3,), (8, 1)])
def test_row_3_11_a_user_method_that_returns_another_shape_leaves_no_orphan(shape):
    layer = pruned(nn.Linear(8, 8))
    expected = layer(X)
    if shape == (3,):
        with pytest.raises(RuntimeError, match="must match the existing size"):
            Fixed.apply(layer, "weight", torch.ones(shape))
    else:
        Fixed.apply(layer, "weight", torch.ones(shape))  # torch's container broadcasts what broadcasts
    assert layer.weight_mask.shape == (8, 8)
    assert torch.equal(layer(X), expected)
    assert list(fp.remove(layer)._buffers) == []


def test_row_3_12_a_mask_that_requires_grad():
    layer = pruned(nn.Linear(8, 8), sparsity=0.25)
    Fixed.apply(layer, "weight", (torch.arange(64).view(8, 8) % 2).float().requires_grad_())
    assert not layer.weight_mask.requires_grad
    train(layer, X, steps=3)
    assert_in_force(layer, lambda: layer(X))


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
def test_row_3_13_dtypes(dtype):
    layer = nn.Linear(8, 8, bias=False)
    layer.weight = nn.Parameter((torch.randn(8, 8) * 50).to(dtype), requires_grad=dtype != torch.int8)
    fp.magnitude_unstructured(layer, "weight", 0.5)
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


def test_row_3_14_fp8():
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    fp.magnitude_unstructured(layer, "weight", 0.5)
    assert layer.weight_mask.sum() == 32
    assert layer.weight.dtype is torch.float8_e4m3fn
    assert not layer.weight.float()[~layer.weight_mask].any()


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

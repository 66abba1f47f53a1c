"""Row 7.15 of docs/explanation/host.md: copies for quantisers and exporters, which know nothing of masks."""

from __future__ import annotations

import copy

import pytest
import torch
from hosts import mlp, pruned, snapshot
from torch import nn
from torch.ao import quantization
from torch.ao.quantization import quantize_fx
from torch.nn.utils import prune

import torch_flowprune as fp

ROWS = {
    "7.15": (
        "quantisation, eager, by graphs or dynamic, leaves masked layers in float, or breaks",
        "documented",
        (
            "it matches exact classes. Preparing a masked model for it is a warning, and the error of "
            "`fuse_modules` says that the class is a masked one. Quantise `fp.export_ready(model)`, a copy with "
            "the masks made permanent, which is checked to be equal. Counters that look operators up by class "
            "(thop, ptflops) count a masked layer as nothing: count that copy"
        ),
    ),
}

X = torch.linspace(-1, 1, 24).view(3, 8)

deprecated = pytest.mark.filterwarnings("ignore:.*deprecat", "ignore:.*quant_min", "ignore:.*reduce_range")


def tied():
    model = mlp()
    model.append(nn.Linear(4, 8))
    model.append(nn.Linear(8, 8))
    model[4].weight = model[0].weight
    return pruned(model)


def by_torch():
    model = mlp()
    prune.l1_unstructured(model[0], "weight", 0.5)
    with torch.no_grad():
        model[0].weight_orig.mul_(2)  # torch's cached product is stale until the next forward
    return model


MODELS = {
    "dense": mlp,
    "pruned": pruned,
    "tied": tied,
    "by torch": by_torch,
    "with statistics": lambda: pruned(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 2))),
    "recurrent": lambda: pruned(nn.LSTM(8, 8), include="*"),
    "half": lambda: pruned().bfloat16(),
}


@pytest.mark.parametrize("case", MODELS)
def test_row_7_15_a_copy_of_plain_modules_that_computes_the_same(case):
    model = MODELS[case]()
    inputs = X.to(next(model.parameters()).dtype)
    before = snapshot(model)
    plain = fp.export_ready(model, inputs)
    assert snapshot(model) == before
    assert not fp.masks(plain)
    assert not prune.is_pruned(plain)
    assert {type(module) for module in plain.modules()} <= {getattr(nn, type(m).__name__) for m in model.modules()}
    assert plain.training
    for one, other in zip(model.eval()(inputs), plain.eval()(inputs), strict=True):
        torch.testing.assert_close(one, other)


def test_row_7_15_a_counter_that_looks_classes_up_counts_all_of_the_copy_and_nothing_of_masked_layers():
    costs = {nn.Linear: lambda layer: layer.weight.numel()}  # as thop and ptflops hold them

    def counted(model):
        return sum(costs[type(layer)](layer) for layer in model if type(layer) in costs)

    model = pruned()
    assert counted(model) == 0
    assert counted(fp.export_ready(model)) == counted(mlp())


def test_row_7_15_a_wrapped_model_is_copied_without_its_wrapper():
    model = pruned()
    plain = fp.export_ready(torch.compile(model, backend="eager"))
    assert type(plain) is nn.Sequential
    assert torch.equal(plain(X), model(X))


class Doubled(nn.Linear):
    """Its copies are other layers than itself."""

    def __deepcopy__(self, memo):
        twin = type(self).__new__(type(self))
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        with torch.no_grad():
            twin.bias.add_(1)
        return twin


class Counted(nn.Linear):
    """Another function in its copies, by what is no tensor."""

    scale = 1.0

    def __deepcopy__(self, memo):
        twin = type(self).__new__(type(self))
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        twin.scale = 2.0
        return twin

    def forward(self, x):
        return super().forward(x) * self.scale


@pytest.mark.parametrize(("kind", "what"), [(Doubled, "bias differs"), (Counted, "the output, by up to")])
def test_row_7_15_a_copy_that_differs_is_refused(kind, what):
    with pytest.raises(ValueError, match=f"the copy is not equal to the model: {what}"):
        fp.export_ready(pruned(kind(8, 8)), X)


def is_quantized(model):
    return {name for name, module in model.named_modules() if "quantized" in type(module).__module__}


def eager(model, inputs=X):
    model = nn.Sequential(quantization.QuantStub(), *model, quantization.DeQuantStub()).eval()
    model.qconfig = quantization.default_qconfig
    prepared = quantization.prepare(model)
    prepared(inputs)
    return quantization.convert(prepared)


def by_graphs(model, inputs=X):
    prepared = quantize_fx.prepare_fx(model.eval(), quantization.get_default_qconfig_mapping(), (inputs,))
    prepared(inputs)
    return quantize_fx.convert_fx(prepared)


def dynamic(model):
    return quantization.quantize_dynamic(model)


@deprecated
@pytest.mark.parametrize("quantize", [eager, by_graphs, dynamic])
def test_row_7_15_quantisation_warns_of_masks_and_takes_what_is_export_ready(quantize):
    model = pruned()
    assert is_quantized(quantize(fp.export_ready(model)))
    prepare = quantization.propagate_qconfig_ if quantize is eager else quantize
    with pytest.warns(UserWarning, match=r"a masked model is prepared .*quantise fp.export_ready\(model\)"):
        prepare(model)


@deprecated
def test_row_7_15_the_error_of_fuse_modules_says_what_makes_a_masked_layer_plain():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    x = torch.randn(2, 2, 6, 6)
    fp.global_prune(model, "magnitude", 0.5)
    expected = model(x)
    with pytest.raises(
        AssertionError, match=r"Conv2d'> \(masked: fp.remove\(model\) or fp.export_ready\(model\) makes"
    ):
        quantization.fuse_modules(model, [["0", "1", "2"]])
    fused = quantization.fuse_modules(fp.remove(model), [["0", "1", "2"]])
    torch.testing.assert_close(fused(x), expected)
    assert "masked" not in repr(type(model[0]))


@deprecated
def test_row_7_15_shrunk_models_are_fused_where_no_mask_is_left():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 3)).eval()
    x = torch.randn(2, 2, 8, 8)
    fp.global_prune(model, "magnitude", 0.5, granularity="channel", example_inputs=x)
    small = fp.shrink(model, x)
    fused = quantization.fuse_modules(small, [["0", "1", "2"]])
    assert fused[0][0].out_channels == 4
    torch.testing.assert_close(fused(x), model(x))


def stock():
    """Convolutions with batch norm, which graphs fold in."""
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


@deprecated
@pytest.mark.parametrize("make", [lambda: (mlp(), X), lambda: (stock(), torch.linspace(-1, 1, 768).view(1, 3, 16, 16))])
@pytest.mark.parametrize("quantize", [eager, by_graphs])
def test_row_7_15_what_is_quantised_computes_what_the_masked_model_does_and_keeps_its_zeros(quantize, make):
    torch.manual_seed(0)
    model, inputs = make()
    model.eval()
    fp.global_prune(model, "magnitude", 0.7)
    expected = model(inputs)
    quantized = quantize(fp.export_ready(model, inputs), inputs)
    assert (quantized(inputs) - expected).abs().max() < 0.05 * expected.abs().max()
    weights = [module.weight().dequantize() for module in quantized.modules() if is_quantized(nn.ModuleList([module]))
               and callable(getattr(module, "weight", None))]  # fmt: skip
    masks = fp.masks(model)
    assert len(weights) == len(masks)
    for mask in masks.values():
        assert any(weight.shape == mask.shape and not weight[~mask].any() for weight in weights)

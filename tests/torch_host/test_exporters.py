"""Rows 7.19 to 7.22 of docs/explanation/host.md: other runtimes, which are handed a copy whose masks are permanent."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import torch_flowprune as fp

ROWS = {
    "7.19": (
        "ExecuTorch's XNNPACK delegate computes wrong numbers for a masked `Linear`",
        "documented",
        (
            "it does, without an error: lower `fp.export_ready(model)`. Tried with ExecuTorch 1.5.1 on an MLP, a "
            "ResNet, a ViT and a MobileNet: equal to 3e-7, where the masked MLP was off by forty times its "
            "largest output"
        ),
    ),
    "7.20": (
        "Core ML's converter has no operator for a mask in a graph of `torch.export`",
        "documented",
        (
            "an error of its own (`where.scalarother`); convert `fp.export_ready(model)`, whose zeros are those of the "
            "constants. Tried with coremltools 9.0, away from a Mac: converted, not run"
        ),
    ),
    "7.21": (
        "NNCF leaves masked weights in float, and fails on graphs of masked convolutions with batch norm",
        "documented",
        (
            "it still does: quantise `fp.export_ready(model)`, whose zeros stay zeros. Tried with NNCF 3.4: by "
            "graphs of `torch.export` an MLP and a small convolutional net, by modules a ResNet, of which 51 "
            "quantisers were put into the copy and 30 into the masked model"
        ),
    ),
    "7.22": (
        "OpenVINO reads the weights of a model that it converts",
        "handled",
        "masked or not: the constants have the mask's zeros. Tried with OpenVINO 2026.4, also on shrunk models",
    ),
}  # fmt: skip

MLP, CNN = torch.linspace(-1, 1, 64).view(1, 64), torch.linspace(-1, 1, 768).view(1, 3, 16, 16)


def mlp():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16)), MLP


def cnn():
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)), CNN


def pruned(make):
    torch.manual_seed(0)
    model, inputs = make()
    model.eval()
    fp.global_prune(model, "magnitude", 0.7)
    return model, inputs


def by_xnnpack(model, inputs):
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    program = torch.export.export(model, (inputs,))
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    return Runtime.get().load_program(lowered.buffer).load_method("forward").execute([inputs])[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [mlp, cnn])
def test_row_7_19_what_executorch_computes(make):
    pytest.importorskip("executorch")
    model, inputs = pruned(make)
    torch.testing.assert_close(by_xnnpack(fp.export_ready(model, inputs), inputs), model(inputs), rtol=1e-4, atol=1e-5)


def converted(model, inputs):
    import coremltools

    program = torch.export.export(model, (inputs,)).run_decompositions({})
    exact = coremltools.precision.FLOAT32
    made = coremltools.convert(program, convert_to="mlprogram", skip_model_load=True, compute_precision=exact)
    operators = [one for function in made._mil_program.functions.values() for one in function.operations]
    return [one.outputs[0].val for one in operators if one.op_type == "const"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [mlp, cnn])
def test_row_7_20_what_core_ml_is_given(make):
    pytest.importorskip("coremltools")
    model, inputs = pruned(make)
    with pytest.raises(NotImplementedError, match="where"):
        converted(model, inputs)
    constants = converted(fp.export_ready(model, inputs), inputs)
    found = sum(int((value == 0).sum()) for value in constants if getattr(value, "ndim", 0) > 1)
    matrices = [p for p in fp.export_ready(model, inputs).parameters() if p.dim() > 1]
    assert found == sum(int((p == 0).sum()) for p in matrices)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [mlp, cnn])
def test_row_7_21_what_nncf_quantises(make):
    nncf = pytest.importorskip("nncf")
    model, inputs = pruned(make)
    masked = torch.export.export(model, (inputs,)).module()
    if make is cnn:
        with pytest.raises(ValueError, match="Expected get_attr node"):
            nncf.quantize(masked, nncf.Dataset([inputs]), subset_size=1)
    else:
        in_float = nncf.quantize(masked, nncf.Dataset([inputs]), subset_size=1).state_dict().values()
        assert not any(value.dtype is torch.int8 for value in in_float)
    plain = torch.export.export(fp.export_ready(model, inputs), (inputs,)).module()
    quantized = nncf.quantize(plain, nncf.Dataset([inputs]), subset_size=1)
    expected = model(inputs)
    assert (quantized(inputs) - expected).abs().max() < 0.1 * expected.abs().max()
    integers = [value for value in quantized.state_dict().values() if value.dtype is torch.int8 and value.dim() > 1]
    for name, mask in fp.masks(model).items():
        assert any(value.shape == mask.shape and not value[~mask].any() for value in integers), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [mlp, cnn])
def test_row_7_22_what_openvino_converts(make):
    openvino = pytest.importorskip("openvino")
    model, inputs = pruned(make)
    expected = sum(int((~mask).sum()) for mask in fp.masks(model).values())
    for given in (model, fp.export_ready(model, inputs)):
        converted = openvino.convert_model(given, example_input=inputs)
        compiled = openvino.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        output = torch.from_numpy(compiled(inputs.numpy())[0])
        torch.testing.assert_close(output, model(inputs).detach(), rtol=1e-4, atol=1e-5)
        constants = [one.data for one in converted.get_ops() if one.get_type_name() == "Constant"]
        assert sum(int((value == 0).sum()) for value in constants if value.ndim > 1) == expected

"""The first three lines of a new user: the default channel prune leaves a network that lives, shrinks and is equal."""

import json
from pathlib import Path

import pytest
import torch

import torch_flowprune as fp

timm = pytest.importorskip("timm")

ROOT = Path(__file__).parents[2]
LISTED = ROOT / "benchmarks" / "results" / "models" / "coverage.models.json"
QUICK = ("test_byobnet", "test_convnext", "test_efficientnet", "test_mambaout", "test_resnet", "test_vit")
TINY = [
    name for name in timm.list_models("test_*") if name not in (*QUICK, "test_nfnet")
]  # that one standardises kernels
COVERED = [name.partition("/")[2] for name in (json.loads(LISTED.read_text()) if LISTED.exists() else [])]
SHARES = (0.25, 0.5, 0.75)

pytestmark = pytest.mark.filterwarnings(
    "ignore:under a tenth:torch_flowprune.LayerCollapseWarning",
    "ignore::torch_flowprune.TiedScoresWarning",
    "ignore:.*stays dense:UserWarning",
    "ignore::FutureWarning",
    "ignore::DeprecationWarning",
)


def small(name):
    """A timm model with an input of a size that it takes."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    config = model.default_cfg
    side = config["input_size"][-1]
    if not config.get("fixed_input_size") and side >= 160:
        side = 96
    return model, torch.randn(2, 3, side, side)


def prune_and_shrink(model, inputs, share):
    """The lines themselves; outputs are compared, and no layer is empty."""
    report = fp.global_prune(model, "magnitude", share, granularity="channel", example_inputs=inputs)
    assert report.pruned == round(share * report.units)
    assert all(layer.pruned < layer.units for layer in report.layers)
    smaller = fp.shrink(model, inputs)
    assert sum(p.numel() for p in smaller.parameters()) == report.left.parameters
    keywords = inputs if isinstance(inputs, dict) else {"x": inputs}
    with torch.no_grad():
        ours, theirs = (first_tensor(net(**keywords)) for net in (model, smaller))
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4 * float(ours.abs().max()))


def first_tensor(output):
    while not isinstance(output, torch.Tensor):
        output = next(iter(output.values() if isinstance(output, dict) else output))
    return output


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in TINY)])
def test_timms_tiny_models(name):
    prune_and_shrink(*small(name), 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", [name for name in COVERED if timm.is_model(name)][:60])
def test_the_smallest_models_of_timms_modules(name, share):
    try:
        prune_and_shrink(*small(name), share)
    except ValueError as error:
        assert "no channel can be pruned" in str(error)


def of_transformers():
    """Small configs of transformers' vision models."""
    return {
        "ResNet": {"embedding_size": 16, "hidden_sizes": [16, 24], "depths": [2, 2]},
        "RegNet": {"embedding_size": 16, "hidden_sizes": [16, 24], "depths": [1, 2], "groups_width": 8},
        "MobileNetV1": {"depth_multiplier": 0.25},
        "MobileNetV2": {"depth_multiplier": 0.25},
        "Segformer": {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [16, 24],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
        },
    }


@pytest.mark.slow
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", of_transformers())
def test_transformers_vision_models(name, share):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**of_transformers()[name])
    model = getattr(transformers, f"{name}ForImageClassification")(config).eval()
    prune_and_shrink(model, {"pixel_values": torch.randn(2, 3, 64, 64)}, share)

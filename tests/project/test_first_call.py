"""The first three lines of a new user: the default channel prune leaves a network that lives, shrinks and is equal.

And the report says what the smaller one costs, as torch's own counter has it.
"""

import copy
import json
from inspect import signature
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import torch_flowprune as fp

timm = pytest.importorskip("timm")

ROOT = Path(__file__).parents[2]
LISTED = ROOT / "benchmarks" / "results" / "models" / "coverage.models.json"
QUICK = ("test_byobnet", "test_convnext", "test_efficientnet", "test_mambaout", "test_resnet", "test_vit")
TINY = [
    name for name in timm.list_models("test_*") if name not in (*QUICK, "test_nfnet")
]  # that one standardises kernels
COVERED = json.loads(LISTED.read_text()) if LISTED.exists() else []
LARGE = 60e6
"""Parameters of the models that are left out of the list: minutes each."""
SHARES = (0.25, 0.5, 0.75)

pytestmark = pytest.mark.filterwarnings(
    "ignore:less than a tenth:torch_flowprune.LayerCollapseWarning",
    "ignore::torch_flowprune.TiedScoresWarning",
    "ignore:.*stays dense:UserWarning",
    "ignore:TF32 acceleration",
    "ignore::FutureWarning",
    "ignore::DeprecationWarning",
)


def small(name):
    """A model of timm or torchvision with an input of a size that it takes, a small one if it may be."""
    torch.manual_seed(0)
    library, _, own = name.partition("/")
    if library == "torchvision":
        model = pytest.importorskip("torchvision").models.get_model(own).eval()
        side, fixed = (299 if "inception" in own else 224), own.startswith(("vit", "maxvit", "inception", "googlenet"))
    else:
        model = timm.create_model(own or library).eval()
        side, fixed = model.default_cfg["input_size"][-1], model.default_cfg.get("fixed_input_size")
    if not fixed and side >= 160 and "halo" not in name:  # whose blocks divide the whole size only
        side = 96
    return model, torch.randn(2, 3, side, side)


def flops(model, inputs):
    """By torch's counter: attention and recurrent layers as products of matrices, which it sees on every device."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            sdpa_kernel(SDPBackend.MATH),
            torch.backends.mkldnn.flags(enabled=False),
            FlopCounterMode(display=False) as counter,
            torch.no_grad(),
        ):
            # without gradients: the counter follows those that modules hand to each other
            copy.deepcopy(model).requires_grad_(False)(**inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops()


def prune_and_shrink(model, inputs, share):
    """The lines themselves; outputs are compared, and no layer is empty."""
    report = fp.global_prune(model, "magnitude", share, granularity="channel", example_inputs=inputs)
    assert report.pruned == round(share * report.units)
    assert all(layer.pruned < layer.units for layer in report.layers)
    smaller = fp.shrink(model, inputs)
    keywords = inputs if isinstance(inputs, dict) else {next(iter(signature(model.forward).parameters)): inputs}
    parameters = sum(p.numel() for p in smaller.parameters())
    assert report.left == fp.Size(parameters, flops(smaller, keywords))
    with torch.no_grad():
        ours, theirs = (first_tensor(seeded(net)(**keywords)) for net in (model, smaller))
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4 * float(ours.abs().max()))


def seeded(model):
    """Some draw what they look at (ViTMAE its patches), in eval mode too."""
    torch.manual_seed(0)
    return model


def first_tensor(output):
    while not isinstance(output, torch.Tensor):
        output = next(iter(output.values() if isinstance(output, dict) else output))
    return output


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in TINY)])
def test_timms_tiny_models(name):
    prune_and_shrink(*small(name), 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", COVERED)
def test_the_smallest_models_of_timms_modules_and_torchvisions_classifiers(name, share):
    library, _, own = name.partition("/")
    if library == "timm" and not timm.is_model(own):
        pytest.skip("this timm has no such model")
    model, x = small(name)
    if sum(p.numel() for p in model.parameters()) > LARGE:
        pytest.skip("large")
    try:
        prune_and_shrink(model, x, share)
    except ValueError as error:
        assert "no channel can be pruned" in str(error)


def of_transformers():
    """Small configs of transformers' vision models."""
    transformer = {
        "hidden_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "intermediate_size": 48,
        "image_size": 64,
        "patch_size": 16,
    }
    return {
        "ResNet": {"embedding_size": 16, "hidden_sizes": [16, 24], "depths": [2, 2]},
        "RegNet": {"embedding_size": 16, "hidden_sizes": [16, 24], "depths": [1, 2], "groups_width": 8},
        "ConvNextV2": {"hidden_sizes": [16, 24], "depths": [1, 1], "num_stages": 2},
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
        "DPT": {
            **transformer,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [8, 8, 16, 16],
            "fusion_hidden_size": 16,
            "is_hybrid": False,
        },
        "ViTMAE": {
            **transformer,
            "decoder_hidden_size": 16,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 32,
            "mask_ratio": 0.0,
        },
    }


HEADS = {"DPT": "ForDepthEstimation", "ViTMAE": "Model"}


@pytest.mark.slow
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", of_transformers())
def test_transformers_vision_models(name, share):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**of_transformers()[name])
    model = getattr(transformers, name + HEADS.get(name, "ForImageClassification"))(config).eval()
    prune_and_shrink(model, {"pixel_values": torch.randn(2, 3, 64, 64)}, share)

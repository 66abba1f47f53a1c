"""Ten rounds of SynFlow on a model of every module of timm: the masks are those of float64."""

import copy
import json
from pathlib import Path

import pytest
import torch

import torch_flowprune as fp

timm = pytest.importorskip("timm")

LISTED = Path(__file__).parents[2] / "benchmarks" / "results" / "models" / "coverage.models.json"
QUICK = ("test_convnext", "test_vit", "test_resnet")
FAMILIES = [name.removeprefix("timm/") for name in json.loads(LISTED.read_text()) if name.startswith("timm/")]
LARGE = 15e6
"""Parameters of the models that are left out: minutes each."""

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name not in QUICK)]
)
def test_ten_rounds_are_those_of_float64(name):
    """Of a thousand entries at most one is another: where two scores are nearly equal."""
    if not timm.is_model(name):
        pytest.skip("this timm has no such model")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).eval()
    if sum(p.numel() for p in model.parameters()) > LARGE:
        pytest.skip("large")
    side = model.default_cfg["input_size"][-1]
    side = side if model.default_cfg.get("fixed_input_size") or side < 160 or "halo" in name else 96
    wide = copy.deepcopy(model).double()
    words = {"rounds": 10, "min_keep": 1}
    try:  # linear attention divides by a sum that is 0; some heads are not reached
        fp.scores(model, "synflow", example_inputs=torch.ones(1, 3, side, side))
    except ValueError as error:
        pytest.skip(str(error)[:60])
    for one in (model, wide):
        fp.global_prune(
            one, "synflow", 0.9, example_inputs=torch.ones(1, 3, side, side).to(next(one.parameters())), **words
        )
    found, expected = fp.masks(model), fp.masks(wide)
    assert found.keys() & expected.keys()
    differing = sum(int((found[name] != mask).sum()) for name, mask in expected.items() if name in found)
    assert differing <= sum(mask.numel() for mask in expected.values()) / 1000

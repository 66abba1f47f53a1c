"""The benchmark of coverage: it runs, and what it calls equal is equal."""

import copy
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").exists(), reason="the tests alone, without benchmarks/")


@pytest.fixture
def coverage(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.models.coverage.trial")


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1)).eval()


class Halved:
    """A tool that keeps the first three channels; `fault` breaks what it hands out."""

    def __init__(self, model, x, fault=None):
        self.model, self.x, self.fault = model, x, fault

    def prepare(self):
        pass

    def build(self, ratio):
        if self.fault is not None and "build" in self.fault.__name__:
            self.fault(self.model)

    def facts(self):
        return {"share": 0.6}

    def prune(self, ratio):
        small = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 1)).eval()
        dense = self.model.state_dict()
        small.load_state_dict(
            {k: v[:, :3] if k == "3.weight" else v if k == "3.bias" or not v.ndim else v[:3] for k, v in dense.items()}
        )
        if self.fault is not None and "build" not in self.fault.__name__:
            self.fault(small)
        return small

    def kept(self, small):
        kept = {n: torch.ones_like(p, dtype=torch.bool) for n, p in self.model.named_parameters()}
        for name in ("0.weight", "0.bias", "1.weight", "1.bias"):
            kept[name][3:] = False
        kept["3.weight"][:, 3:] = False
        return kept


def found(coverage, fault=None):
    model, x = net(), torch.randn(2, 3, 4, 4)
    shared = {}
    tool = Halved(model, x, fault)
    *_, last = coverage.at_ratio(tool, coverage.Oracle(model, torch.randn_like(x)), x, 0.5, 0.5, shared)
    return last, shared


def test_a_model_sliced_by_hand_is_equal_and_its_channels_are_counted(coverage):
    last, shared = found(coverage)
    assert (last["status"], last["stage"], last["precision"]) == ("equal", "done", "float64")
    assert last["channels"] == 3 / 10
    assert last["moved"] > 0.01
    assert shared["share"] == 0.6


def test_a_pruned_model_that_runs_in_float32_alone_is_compared_in_that(coverage):
    last, _ = found(coverage, float32_only)
    assert (last["status"], last["precision"]) == ("equal", "float32")


def nudged(small):
    with torch.no_grad():
        small[0].bias[0] += 1e-6


def widened(small):
    small[3] = nn.Conv2d(3, 5, 1)


def float32_only(small):
    small.forward = lambda x: (
        small[3](small[2](small[1](small[0](x)))) if x.dtype == torch.float32 else x @ small[0].weight.float()
    )


def narrowed(small):
    small[3] = nn.Conv2d(2, 4, 1)


def slow_build(model, seconds=60.0):
    start = time.process_time()
    while time.process_time() - start < seconds:
        pass


@pytest.mark.parametrize(
    ("fault", "status", "stage"),
    [
        (nudged, "differs", "done"),
        (widened, "differs", "done"),
        (narrowed, "raises", "forward"),
        (slow_build, "over 0.5 s", "build"),
    ],
)
def test_what_is_wrong_is_named(coverage, fault, status, stage):
    last, _ = found(coverage, fault)
    assert (last["status"], last["stage"]) == (status, stage)


def test_equality_that_says_nothing_is_not_called_equal(coverage):
    assert coverage.verdict(1e-16, 1e-3, 1e-10) == "equal"
    assert coverage.verdict(1e-16, 1e-9, 1e-10) == "runs"
    assert coverage.verdict(float("nan"), 1.0, 1e-10) == "differs"


def test_a_model_that_casts_is_held_to_what_float32_can_tell(coverage):
    casting = nn.Sequential(nn.Linear(3, 2))
    casting.forward = lambda x: nn.functional.linear(x.float(), casting[0].weight.float()).to(x)
    assert coverage.Oracle(casting, torch.randn(2, 3)).dense(torch.float64)[1] == "float32"
    assert coverage.Oracle(nn.Linear(3, 2), torch.randn(2, 3)).dense(torch.float64)[1] == "float64"


def test_numbers_in_gradients_tell_which_slices_were_kept(coverage):
    dense = net()
    peer = coverage.Peer(dense, torch.randn(2, 3, 4, 4))
    small = copy.deepcopy(dense)
    for p in small.parameters():
        coverage.number(p)
    left = torch.tensor([0, 2, 5])
    for module, name, axis in ((0, "weight", 0), (0, "bias", 0), (1, "weight", 0), (1, "bias", 0), (3, "weight", 1)):
        old = getattr(small[module], name)
        new = nn.Parameter(old.detach().index_select(axis, left))
        new.grad = old.grad.index_select(axis, left)
        setattr(small[module], name, new)
    kept = peer.kept(small)
    expected = torch.zeros(6, dtype=torch.bool)
    expected[left] = True
    assert all(torch.equal(kept[n], expected) for n in ("0.bias", "1.weight", "1.bias"))
    assert torch.equal(kept["3.weight"], expected[None, :, None, None].expand(4, 6, 1, 1))
    assert bool(kept["3.bias"].all())
    with torch.no_grad():
        dense[0].bias[2] += 1
    for p in small.parameters():
        coverage.number(p)
    assert peer.kept(small) is None, "a parameter with other values than the dense model's can not be followed"


@pytest.mark.parametrize("name", ["timm/test_resnet", "timm/test_vit"])
def test_tiny_models_are_pruned_shrunk_and_equal(coverage, name):
    pytest.importorskip("timm")
    *_, last = coverage.trial("ours", name, (0.5, 0.25))
    assert [last[ratio]["status"] for ratio in ("0.5", "0.25")] == ["equal", "equal"]
    assert last["share"] > 0.5
    assert not last["unknown"]


def test_the_command_keeps_its_results_with_their_commit_and_writes_the_page(tmp_path):
    pytest.importorskip("timm")
    (tmp_path / "c.models.json").write_text(json.dumps(["timm/test_resnet", "timm/no_such_model"]))
    command = [sys.executable, "-m", "benchmarks.models.coverage", "--out", tmp_path / "c", "--docs", tmp_path / "c.md"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    first = (tmp_path / "c.json").read_text()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert (tmp_path / "c.json").read_text() == first, "what is known is not measured again"
    rows = json.loads(first)["results"]
    assert rows["timm/test_resnet"]["ours"]["0.5"]["status"] == "equal"
    assert all(row["ours"]["commit"] for row in rows.values())
    assert rows["timm/no_such_model"]["ours"]["died"] == "exit code 1"
    page = (tmp_path / "c.md").read_text()
    assert "| timm/test\\_resnet | 0.5 |" in page
    assert "| **equal** | 1 | - | - | - |" in page
    assert "- timm/no_such_model: exit code 1" in page
    rows["timm/test_resnet"]["ours"]["build_s"] = 1000.0
    (tmp_path / "c.json").write_text(json.dumps({**json.loads(first), "results": rows}))
    subprocess.run([*command, "--builds"], cwd=ROOT, check=True, capture_output=True)
    anew = json.loads((tmp_path / "c.json").read_text())["results"]["timm/test_resnet"]["ours"]
    assert 0 < anew.pop("build_s") < 100
    assert anew.items() <= rows["timm/test_resnet"]["ours"].items(), "nothing else was measured"
    page = " ".join((tmp_path / "c.md").read_text().split())  # where lines break depends on the commit's name
    assert "Seconds to build: both tools in turns, the median of three rounds" in page


def row(coverage, status, **more):
    return {
        "commit": "abc",
        "parameters": 1e6,
        **more,
        "0.5": {"status": status, "stage": "done", "prune_s": 2.0, "parameters": 0.4, "graphs": 1},
    }


def test_the_page_counts_what_each_tool_did(coverage):
    page = importlib.import_module("benchmarks.models.coverage.page")
    results = {
        "timm/a": {
            "ours": row(coverage, "equal", build_s=1.0, share=0.5),
            "peer": row(coverage, "differs", build_s=3.0, share=0.7),
        },
        "timm/b": {
            "ours": row(coverage, "nothing prunable", build_s=2.0, share=0.0, frozen={"is summed": 7}),
            "peer": row(coverage, "over 150 s"),
        },
        "torchvision/c": {"ours": row(coverage, "equal", build_s=1.0, share=0.9, unknown={"sort": 2})},
    }
    text = page.page({"environment": {"versions": {"torch": "2"}, "processor": "CPU"}, "results": results}, 4)
    counts = {
        line.split(" | ")[0].strip("| "): [c.strip(" |") for c in line.split(" | ")[1:]]
        for line in text.splitlines()
        if line.startswith("| ")
    }
    assert counts["**equal**"] == ["1", "0", "1", "-"]
    assert counts["runs and differs"] == ["0", "1", "0", "-"]
    assert counts["over the limit"] == ["0", "1", "0", "-"]
    assert counts["nothing prunable"] == ["1", "0", "0", "-"]
    assert counts["groups built"] == ["2", "1", "1", "-"]
    assert "On the 1 models whose groups both find, this package takes 1.00 s at the median" in text
    assert "this package is the faster one on 1." in text
    assert "- timm/b: nothing prunable. 7 channels: is summed" in text
    assert "`sort` (1 models)" in text
    assert "3 of 4 models" in text

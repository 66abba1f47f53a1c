"""The benchmarks run: a small version of each, so that none rots between two measurements."""

import importlib
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

import torch_flowprune as fp

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").exists(), reason="the tests alone, without benchmarks/")


@pytest.fixture
def lifecycle(monkeypatch):
    pytest.importorskip("timm")
    pytest.importorskip("torchvision")
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.models.lifecycle")


def test_cost_quick_measures_every_measure_granularity_and_both_pruners(tmp_path):
    out = tmp_path / "cost.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.cost.calls", "--quick", "--out", out],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "prune.global_unstructured" in done.stdout
    found = json.loads(out.read_text())
    assert {"processor", "cores", "memory_gib", "versions", "commit", "threads"} <= found["environment"].keys()
    (small,) = found["models"].values()
    assert small["scoring"]["measures"].keys() == fp.MEASURES.keys()
    assert all(by.keys() == {"weight", "filter", "2:4"} for by in small["scoring"]["measures"].values())
    assert small["selection"].keys() > small["memory"].keys() == {"global_prune", "prune.global_unstructured"}
    assert small["memory"]["prune.global_unstructured"]["held ratio"] > small["memory"]["global_prune"]["held ratio"]


def test_table_quick_has_a_row_for_every_goal_of_its_kind(tmp_path):
    pytest.importorskip("transformers")
    out = tmp_path / "table.json"
    command = [sys.executable, "-m", "benchmarks.cost.goals", "--quick", "--large", "--out", out]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["work"] for row in rows] == [
        "magnitude, 90 %",
        "peak extra memory, masks included",
        "held after",
        "operator calls",
        "calls the host waits for",
        "masked training step, batch 2",
        "masked eval forward, batch 2",
        "growth of time with the weights",
        "growth of peak extra memory with the weights",
        "magnitude, 90 %",
        "loss_preservation, 90 %",
    ]
    assert all(
        row["met"] == (row["measured"] >= row["goal"] if row["more"] else row["measured"] <= row["goal"])
        for row in rows
    )
    assert rows[2]["measured"] == 0.25  # one byte a weight of four
    assert done.stdout.count("met |") + done.stdout.count("**missed** |") == len(rows)


def test_the_page_of_goals_has_the_rows_of_every_result_kept(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    table = importlib.import_module("benchmarks.cost.goals")
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    found = table._results()
    assert {"benchmarks.cost.goals", "benchmarks.cost.sweeps"} <= {result["command"].split()[2] for result in found}
    assert all(table.report(result) in page for result in found)


def kept(path):
    return json.loads((ROOT / "benchmarks" / "results" / path).read_text(encoding="utf-8"))


def test_the_pages_made_from_a_result_say_what_it_says(monkeypatch):
    """What a result makes is the whole page, or stands in it; goals and the paper's have tests of their own."""
    for library in ("timm", "torchvision", "transformers"):
        pytest.importorskip(library)
    monkeypatch.syspath_prepend(str(ROOT))
    load = importlib.import_module

    def page(name):
        return (ROOT / name).read_text(encoding="utf-8")

    known = len(kept("models/coverage.models.json"))
    coverage = load("benchmarks.models.coverage.page").page(kept("models/coverage.json"), known)
    assert coverage == page("docs/results/coverage.md")
    cifar10 = load("benchmarks.accuracy.cifar10").page(kept("accuracy/cifar10.json"))
    assert cifar10 == page("docs/results/cifar10.md")
    derivatives = load("benchmarks.models.second_derivatives").page(kept("models/second_derivatives.json"))
    assert derivatives == page("docs/results/second_derivatives.md")
    found, text = kept("models/families.json"), page("docs/results/families.md")
    missing = re.search(r"not run: (.*?)\.\*\*", text, re.DOTALL)[1].split(",")
    keys = [*(row["key"] for row in found["results"]), *(key.strip() for key in missing)]
    assert load("benchmarks.models.families").page(found["environment"], found["results"], keys) == text
    assert load("benchmarks.cost.latency").report(kept("cost/latency.json")) in page("docs/guide/structured.md")
    assert load("benchmarks.cost.depth").report(kept("cost/depth.json")) in page("docs/guide/structured.md")
    assert load("benchmarks.cost.targets").report(kept("cost/targets.json")) in page("docs/guide/allocation.md")
    assert load("benchmarks.carriers.__main__").report(kept("cost/carriers.json")) in page("docs/explanation/host.md")
    assert load("benchmarks.growth.__main__").report(kept("growth/growth.json")) in page("docs/results/growth.md")


def test_the_landing_page_compares_by_what_was_measured(monkeypatch):
    for library in ("timm", "torchvision", "transformers"):
        pytest.importorskip(library)
    monkeypatch.syspath_prepend(str(ROOT))
    page = importlib.import_module("benchmarks.models.coverage.page")
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    coverage, small = kept("models/coverage.json")["results"], kept("models/peers.json")["results"]
    found = {
        (library, which): page.chosen(coverage, library, which)
        for library in ("timm", "torchvision")
        for which in ("ours", "peer")
    }
    equal = {key: f"{page.COUNTS['**equal**'](rows)} of {len(rows)}" for key, rows in found.items()}
    seconds = [page.COUNTS["seconds to prune 50 %, median"](found["timm", which]) for which in ("ours", "peer")]
    states = [[row[library]["state"] for row in small.values()] for library in next(iter(small.values()))]
    passed = [f"{sum(state in ('equal', 'runs') for state in row)} of {len(row)}" for row in states]
    masks, steps = kept("cost/carriers.json"), ("property, a subclass for each class", "torch.nn.utils.prune")
    held = [f"{sum(row['holds'][way] for row in masks['rows'].values())} of {len(masks['rows'])}" for way in steps]
    for cells in (
        f"{equal['timm', 'ours']} | {equal['timm', 'peer']} |",
        f"{equal['torchvision', 'ours']} | {equal['torchvision', 'peer']} |",
        " | ".join(passed),
        f"{held[0]} | no masks | {held[1]} |",
        f"{seconds[0]}, with the check of the outputs | {seconds[1]} |",
        " | no masks | ".join(f"{masks['steps']['256'][way]:.2f}" for way in steps),
    ):
        assert f"| {cells}" in text


LONG = (
    "python -m benchmarks.cost.sweeps --models resnet50 vgg13 --peer DIR --torch-pruning DIR --out results/sweeps.json"
)


def test_what_is_put_on_a_page_fits_it(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    page = importlib.import_module("benchmarks.common.page")
    shown = page.shown(LONG)
    assert all(len(line) <= 88 and line.startswith("    ") for line in shown.splitlines())
    assert "".join(part.strip(" \\") for part in shown.splitlines()).replace(" ", "") == LONG.replace(" ", "")
    assert page.shown("python -m benchmarks.paper --quiet") == "    python -m benchmarks.paper --quiet"
    words = "- " + "inf - inf 1. of # a | b 50 % of " * 20
    lines = page.wrapped(f"{words}\n| {words} |\n    {words}").splitlines()
    assert lines[-2:] == [f"| {words} |", f"    {words}"], "tables and code as they are"
    assert all(len(line) <= 120 for line in lines[:-2])
    assert all(line.startswith("  ") for line in lines[1:-2])
    assert not any(line.strip().startswith(("- ", "1. ", "# ", "| ", "%")) for line in lines[1:-2]), (
        "nothing else begins in it"
    )
    assert " ".join(lines[:-2]).split() == words.split()


def test_sweeps_quick_has_every_row_and_the_correlations(tmp_path):
    out = tmp_path / "sweeps.json"
    command = [sys.executable, "-m", "benchmarks.cost.sweeps", "--quick", "--correlations", "--out", out]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert len(found["rows"]) == len(done.stdout.splitlines()) - 1 == 9
    assert "; the paper's code not at hand; Torch-Pruning's Taylor not at hand" in found["rows"][0]["note"]
    assert all(row["met"] == (row["measured"] <= row["goal"]) and row["measured"] > 0 for row in found["rows"])
    assert {"processor", "threads", "commit"} <= found["environment"].keys()
    correlations = found["correlations"]["small"]
    assert {
        "loss_preservation",
        "fisher",
        "gradient_norm_preservation",
        "gradient_norm_increase",
    } == correlations.keys()
    assert all(0.5 < value < 1 for value in correlations.values()), "bfloat16 ranks nearly alike, and not quite"


STAND_INS = {
    "imp_estimator.py": """
        import torch
        from torch.nn import functional
        def _grads(net, data, **options):
            loss = sum(functional.cross_entropy(net(x), y) for x, y in data)
            return torch.autograd.grad(loss, list(net.parameters()), **options)
        def cal_hg(net, loader, n_samples, n_classes, T):
            raise RuntimeError("no second derivative here\\nand more")
        def cal_importance_loss_based(net, data):
            return _grads(net, data)
        cal_importance_fisher = cal_importance_loss_based
        """,
    "torch_pruning.py": """
        from types import SimpleNamespace
        importance = SimpleNamespace(GroupTaylorImportance=lambda: lambda parameter: parameter.grad.abs().sum())
        class BasePruner:
            def __init__(self, net, example, importance, pruning_ratio, ignored_layers):
                self.estimate_importance, self.ignored_layers, self.root_module_types = importance, ignored_layers, []
                self.DG = SimpleNamespace(get_all_groups=lambda **_: net.parameters())
        pruner = SimpleNamespace(BasePruner=BasePruner)
        """,
}


def test_sweeps_names_every_peer_that_is_at_hand_and_says_which_is_not(tmp_path):
    """Stand-ins in place of other people's code: one that is timed, and one that this model is too much for."""
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(textwrap.dedent(text))
    command = [
        sys.executable,
        "-m",
        "benchmarks.cost.sweeps",
        "--quick",
        "--peer",
        tmp_path,
        "--out",
        tmp_path / "sweeps.json",
    ]
    for beside in ("Torch-Pruning's Taylor not at hand", "Torch-Pruning's Taylor [0-9.]+, spread [0-9]+%$"):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        notes = {row["work"]: row["note"] for row in json.loads((tmp_path / "sweeps.json").read_text())["rows"]}
        scores = notes["loss preservation and Fisher, filters, 20 batches"]
        assert re.search(f"; the paper's code [0-9.]+, spread [0-9]+%; {beside}", scores), scores
        assert notes["H·g, six batches"].endswith("; the paper's code fails (no second derivative here)")
        assert len(notes) == 9, "no ratio to a peer that was not timed"
        command += ["--torch-pruning", tmp_path]


class Bypass(nn.Linear):
    """A layer that takes its values past the mask, as a stale cache does."""

    def forward(self, x):
        return functional.linear(x, self._parameters.get("weight_orig", self._parameters.get("weight")), self.bias)


def subject(lifecycle, layer):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), layer(64, 8), nn.ReLU(), nn.Linear(8, 3)
    )
    batches = [(torch.randn(4, 3, 6, 6), torch.tensor([0, 1, 2, 0])) for _ in range(2)]
    zoo = sys.modules["benchmarks.models.zoo"]
    return zoo.Subject(model, batches, lambda model, batch: functional.cross_entropy(model(batch[0]), batch[1]))


@pytest.mark.parametrize("granularity", ["weight", "filter"])
def test_a_pruned_model_passes_the_whole_life_cycle(lifecycle, granularity):
    result = lifecycle.Lifecycle(subject(lifecycle, nn.Linear), "loss_preservation", granularity).run()
    assert not any(result["checks"].values()), result
    assert result["notes"] == []


def test_a_forward_that_goes_past_the_mask_is_found(lifecycle):
    result = lifecycle.Lifecycle(subject(lifecycle, Bypass), "magnitude", "weight").run()
    assert {check for check, outcome in result["checks"].items() if outcome} >= {
        "forward",
        "train",
        "masks_hold",
        "state_dict",
    }
    assert "1 of 3 (4.weight)" in result["notes"][0]


def test_latency_quick_measures_speed_and_memory_before_and_after(tmp_path):
    out = tmp_path / "latency.json"
    command = [sys.executable, "-m", "benchmarks.cost.latency", "--quick", "--out", out]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    (small,) = found["models"].values()
    assert small["channels"] == 0.5
    assert small["error"] < 1e-4
    first, second, head = 64 * 28 + 128, 64 * (9 * 64 + 1), 10 * 65
    assert small["parameters"] == {"dense": first + second + head, "shrunk": first // 2 + 32 * (9 * 32 + 1) + 10 * 33}
    assert small["flops"]["shrunk"] < 0.3 * small["flops"]["dense"]
    assert all(small["seconds"][kind]["runs"] == 3 for kind in ("dense", "masked", "shrunk"))
    assert min(small["memory"][kind]["peak"] for kind in ("dense", "shrunk")) > 0
    assert "| small | 27% | 26% |" in done.stdout


def test_depth_quick_leaves_out_blocks_and_as_many_parameters_in_channels(capsys):
    found = importlib.import_module("benchmarks.cost.depth").main(["--quick"])
    (small,) = found["models"].values()
    branch, rest = 16 * 24 + 24 + 24 * 16 + 16, 9 * 16 + 17 * 4
    blocks = [small[kind]["parameters"] for kind in ("dense", "25% of the blocks", "50% of the blocks")]
    assert blocks == [rest + 4 * branch, rest + 3 * branch, rest + 2 * branch]
    for share, whole in zip(("25%", "50%"), blocks[1:], strict=True):
        assert 0.9 * whole <= small[f"{share}: channels"]["parameters"] <= whole
    assert "| small | 50%: as many parameters in channels | 51% |" in capsys.readouterr().out


def test_targets_quick_holds_what_was_foretold_against_the_shrunk_model(tmp_path):
    out = tmp_path / "targets.json"
    command = [sys.executable, "-m", "benchmarks.cost.targets", "--quick", "--out", out]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [(row["model"], row["allocation"]) for row in rows] == [("small", "global"), ("small", "layer")]
    for row in rows:
        (dense, small), (held, less) = row["bytes_foretold"], row["bytes_taken"]
        assert small <= 0.7 * dense
        assert (held >= dense, less >= small) == (True, True)
        assert min(*row["ms_foretold"], *row["ms_taken"]) > 0


def test_carriers_quick_tries_every_way_on_every_row(tmp_path):
    out = tmp_path / "carriers.json"
    command = [sys.executable, "-m", "benchmarks.carriers", "--quick", "--out", out]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=300)
    found = json.loads(out.read_text(encoding="utf-8"))
    assert len(found["rows"]) > 30
    ways = list(found["steps"]["16"])
    assert all(list(row["holds"]) == ways for row in found["rows"].values())
    lost = [number for number, row in found["rows"].items() if not row["holds"][ways[0]]]
    assert lost == ["7.15"], "what the package's own way does not keep: code that goes by exact class"


def test_growth_quick_measures_every_side(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT))
    growth = importlib.import_module("benchmarks.growth.__main__")
    monkeypatch.setattr(growth, "steady", lambda _: None)
    monkeypatch.setattr(growth, "_ENOUGH", 0.0)

    def here(name, side, size):
        growth.main(["--one", name, side, str(size)])
        return json.loads(capsys.readouterr().out)

    monkeypatch.setattr(growth, "_apart", here)
    out = tmp_path / "growth.json"
    growth.main(["--quick", "--only", "tracked", "tokens", "--out", str(out)])
    growths = json.loads(out.read_text())["growths"]
    assert growths.keys() == {"tracked", "tokens"}
    for one in growths.values():
        assert all(len(side["points"]) == 2 for side in one["sides"].values())
        assert all(side["exponents"]["seconds"] is not None for side in one["sides"].values())
    assert "| tokens of one sequence, g and H·g |" in capsys.readouterr().out


def test_an_exponent_is_a_slope_of_logarithms(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    exponent = importlib.import_module("benchmarks.growth.__main__").exponent
    assert exponent({1: 3.0, 10: 300.0, 100: 30000.0}) == pytest.approx(2)
    assert exponent({1: 3.0}) is None
    every = importlib.import_module("benchmarks.growth.works").GROWTHS
    assert all(len(growth.sizes) > 1 and "torch_flowprune" in growth.sides for growth in every.values())

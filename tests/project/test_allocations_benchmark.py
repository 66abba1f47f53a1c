"""The benchmark of allocations runs, goes on where it was, and its allocations are what they are called."""

import importlib
import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[2]
pytest.importorskip("timm")
pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").exists(), reason="the tests alone, without benchmarks/")


@pytest.fixture
def benchmark(monkeypatch):
    """On one tiny net and random images."""
    monkeypatch.syspath_prepend(str(ROOT))
    found = importlib.import_module("benchmarks.accuracy.allocations")
    images = importlib.import_module("benchmarks.accuracy.images").Images
    training = importlib.import_module("benchmarks.accuracy.training")

    def net():
        return nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10),
        )  # fmt: skip

    monkeypatch.setattr(found, "NETS", {"tiny": net})
    monkeypatch.setattr(found, "MEASURES", ("magnitude", "taylor", "loss_preservation"))
    monkeypatch.setattr(
        found, "RECIPES", {"tiny": training.Recipe(epochs=3, rising=1, rate=0.1, tuning_rate=0.01, batch=8)}
    )
    drawn = images(torch.randn(32, 3, 8, 8), torch.randint(10, (32,)))
    monkeypatch.setattr(found, "load", lambda *_: drawn)
    monkeypatch.setattr(found, "SHARINGS", {name: found.SHARINGS[name] for name in ("raw", "lamp")})
    return found


def sharing(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.accuracy.sharing")


def tables_of(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.accuracy.allocation_tables")


@pytest.mark.filterwarnings("ignore")
def test_every_case_is_measured_once_and_a_second_run_adds_nothing(benchmark, tmp_path):
    out = tmp_path / "found.json"
    options = ["--data", "none", "--work", str(tmp_path), "--seeds", "1", "--steps", "1", "--out", str(out)]
    sizes = ["--images", "32", "--score-images", "8", "--held-out", "8", "--tested", "16"]
    benchmark.main([*options, *sizes])
    written = json.loads(out.read_text())
    net = written["nets"]["tiny"]
    cases = 2 * 3 * 3 * len(benchmark.SHARINGS)
    assert len(net["at once"]) == cases
    assert len(net["tuned"]) > cases
    for row in net["at once"]:
        assert row["units"] == 10
        assert row["gone"] == round(row["sparsity"] * 10)
        assert row["emptied"] == 0 or row["sharing"] == "raw"
    page = importlib.import_module("benchmarks.accuracy.allocation_tables").page(written)
    assert "## tiny" in page
    assert "tiny, channel, 50% of flops, accuracy after tuning" in page
    (rows,) = tmp_path.glob("*.jsonl")
    before = rows.read_text()
    benchmark.main([*options, *sizes])
    assert rows.read_text() == before


def test_other_settings_are_another_file(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "plan", lambda _: [])
    options = ["--data", "none", "--work", str(tmp_path), "--steps", "1", "--tested", "8"]
    for held_out in ("4", "8"):
        benchmark.main([*options, "--held-out", held_out, "--out", str(tmp_path / "found.json")])
    assert len(list(tmp_path.glob("*.jsonl"))) == 2


def test_lamp_is_the_formula(monkeypatch):
    scores = torch.tensor([3.0, 1.0, 2.0, 1.0, 0.0])
    written_out = [9 / 9, 1 / 15, 4 / 13, 1 / 14, 0 / 15]  # of the two equal ones the first goes first
    assert sharing(monkeypatch).lamp(scores).tolist() == pytest.approx(written_out)


@pytest.mark.parametrize("name", ["mean", "max", "l2", "lamp"])
def test_layers_of_another_scale_are_ranked_alike_and_zeros_stay(monkeypatch, name):
    transform = sharing(monkeypatch).SHARINGS[name].transform
    scores = torch.rand(7) + 0.1
    torch.testing.assert_close(transform(scores), transform(1000 * scores))
    assert transform(scores).argsort().tolist() == scores.argsort().tolist()
    assert not transform(torch.zeros(3)).any()


def test_training_that_was_stopped_goes_on_as_if_it_had_not(benchmark, tmp_path):
    training = importlib.import_module("benchmarks.accuracy.training")
    images, recipe, start = benchmark.load(), benchmark.RECIPES["tiny"], benchmark.NETS["tiny"]()
    whole, stopped, resumed = deepcopy(start), deepcopy(start), deepcopy(start)
    training.train(whole, images, recipe, tmp_path / "whole.pt")
    left = iter(range(5))  # an epoch has four steps
    with pytest.raises(StopIteration):
        training.train(stopped, images, recipe, tmp_path / "stopped.pt", pause=lambda: next(left))
    training.train(resumed, images, recipe, tmp_path / "stopped.pt")
    assert all(map(torch.equal, whole.state_dict().values(), resumed.state_dict().values()))


def test_the_guide_has_the_table_of_the_file(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    tables = importlib.import_module("benchmarks.accuracy.allocation_tables")
    found = json.loads((tables.ROOT / tables.OUT).read_text())
    assert tables.guide(found) in tables.GUIDE.read_text(encoding="utf-8")


def test_the_figure_is_of_the_files_rows(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT))
    figure = importlib.import_module("benchmarks.accuracy.allocation_figure")
    found = json.loads((ROOT / figure.OUT).read_text())
    for net in found["nets"].values():
        rows = [row for row in net["at once"] if (row["granularity"], row["measure"]) == ("channel", "magnitude")]
        for sharing in figure.DRAWN:
            drawn = dict(figure.points(net, sharing, "least_kept"))
            assert list(drawn) == [30, 50, 70]
            assert {
                100 * row["sparsity"]: 100 * row["least_kept"] for row in rows if row["sharing"] == sharing
            } == drawn
    figure.main(["--out", str(tmp_path / "figure.png")])
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert "](../results/figures/allocations.png)" in (ROOT / "docs" / "guide" / "allocation.md").read_text()
    assert figure.FIGURE.exists()


def test_the_figure_of_accuracy_is_of_the_draws(monkeypatch, tmp_path):
    """Every point is the mean over the draws of one target, in channels or in FLOPs."""
    monkeypatch.syspath_prepend(str(ROOT))
    figure = importlib.import_module("benchmarks.accuracy.accuracy_figure")
    found = json.loads((ROOT / figure.DRAWS).read_text())
    for name in figure.NETS:
        for sharing in figure.DRAWN:
            rows = [
                row
                for row in found["nets"][name]["tuned"]
                if (row["granularity"], row["measure"], row["sharing"]) == ("channel", "magnitude", sharing)
            ]
            points = figure.points(found["nets"][name], sharing)
            assert len(points) == 4
            assert len(rows) == 12, "three draws of each"
            assert sum(accuracy for _, accuracy in points) / 4 == pytest.approx(
                100 * sum(row["accuracy"] for row in rows) / len(rows)
            )
            assert points == sorted(points)
    figure.main(["--out", str(tmp_path / "figure.png")])
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert "](results/figures/accuracy_flops.png)" in (ROOT / "docs" / "index.md").read_text()
    assert figure.FIGURE.exists()


def test_the_guide_has_the_table_of_the_draws(monkeypatch):
    tables = tables_of(monkeypatch)
    found = json.loads((ROOT / tables.DRAWS).read_text())
    text = tables.GUIDE.read_text(encoding="utf-8")
    assert tables.draws(found) in text
    assert tables.losses(found) in text


def test_a_row_of_draws_has_those_in_which_every_way_was_measured(monkeypatch):
    tables = tables_of(monkeypatch)
    case = {"granularity": "filter", "sparsity": 0.5, "cost": "units", "measure": "magnitude"}
    measured = {("raw", 0): 0.5, ("lamp", 0): 0.6, ("raw", 1): 0.7, ("lamp", 1): 0.8, ("raw", 2): 0.9}
    rows = [
        {**case, "sharing": way, "seed": seed, "accuracy": value, "flops": None}
        for (way, seed), value in measured.items()
    ]
    assert tables.draws({"nets": {"net": {"tuned": rows}}}).splitlines() == [
        "| pruned | draws | raw | lamp |",
        "|---|---:|---:|---:|",
        "| net, 50% of filters | 2 | 60.0 ± 14.1 | 70.0 ± 14.1 |",
    ]


def test_channels_show_the_flops_that_they_leave_where_these_were_not_the_target(monkeypatch):
    tables = tables_of(monkeypatch)
    row = {"granularity": "channel", "sparsity": 0.5, "measure": "magnitude", "sharing": "raw", "seed": 0}
    rows = [{**row, "accuracy": 0.6, "flops": 0.27, "loss": 2.5, "cost": cost} for cost in ("units", "flops")]
    found = {"nets": {"net": {"tuned": rows, "at once": rows[:1]}}}
    assert tables.draws(found).splitlines()[2:] == [
        "| net, 50% of FLOPs | 1 | 60.0 |",
        "| net, 50% of channels | 1 | 60.0 / 27% |",
    ]
    assert tables.losses(found).splitlines()[2:] == ["| net, 50% of channels | 1 | 2.50 |"]

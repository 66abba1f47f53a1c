"""The report as a value, a table, a dict and a picture."""

import json

import cases
import pytest
import torch
from cases import CASES
from torch import nn

import torch_flowprune as fp


@pytest.fixture
def report():
    return fp.global_prune(
        cases.cnn(), "grasp", 0.5, data=CASES["cnn"].batches((4, 3)), granularity="filter", min_keep=1
    )


def test_every_number_is_read_off_the_model():
    model = cases.cnn()
    fp.global_prune(model, sparsity=0.2)
    report = fp.global_prune(model, sparsity=0.6)
    by_name = {layer.name: layer for layer in report.layers}
    assert list(by_name) == ["0.weight", "3.weight", "8.weight"]
    for index, layer in zip((0, 3, 8), report.layers, strict=True):
        weight = model[index].weight
        assert layer.shape == tuple(weight.shape)
        assert layer.units == layer.weights == weight.numel()
        assert layer.pruned == layer.weights_pruned == int((weight == 0).sum())
        assert layer.sparsity == layer.pruned / layer.units
    assert report.units == 12 + 24 + 6
    assert report.pruned == 25
    assert report.newly_pruned == sum(layer.newly_pruned for layer in report.layers) == 25 - 8
    assert report.sparsity == 25 / 42


def test_filters_count_units_and_weights():
    model = cases.cnn()
    report = fp.global_prune(model, sparsity=0.5, granularity="filter")
    assert [layer.units for layer in report.layers] == [3, 2, 3]
    for index, layer in zip((0, 3, 8), report.layers, strict=True):
        assert (
            layer.weights_pruned
            == int((model[index].weight == 0).sum())
            == layer.pruned * (layer.weights // layer.units)
        )


def test_threshold_separates():
    model = cases.mlp()
    scores = torch.cat(list(fp.scores(model).values()))
    report = fp.global_prune(model, sparsity=0.5)
    assert int((scores <= report.threshold).sum()) == report.pruned
    assert report.tied == 0


def test_table(report):
    header, *rows, total = report.table().splitlines()
    assert header.split() == ["parameter", "shape", "units", "pruned", "sparsity", "weights", "zeros"]
    assert len(rows) == 3
    assert rows[1].split()[:3] == ["3.weight", "2x3x2x2", "2"]
    assert total.split() == [
        "total",
        "8",
        "4",
        "50.00%",
        "42",
        str(sum(layer.weights_pruned for layer in report.layers)),
    ]
    assert len({len(line) for line in report.table().splitlines()}) == 1, "the columns line up"


def test_text(report):
    text = str(report)
    assert text.startswith("gradient_norm_increase, filter: 4 of 8 units pruned (50.00%), 4 now\n")
    assert f"threshold score {report.threshold:.4g}\n" in text
    assert f"loss {report.loss:.4g} over 7 samples (counted along the first axis, or in lists) before pruning\n" in text
    assert f"predicted change of the loss {report.predicted_loss_change:+.4g} (first order, on the data that" in text
    assert "fp.predict gives an error bar" in text
    assert f"predicted change of ‖g‖² {report.predicted_gradient_norm_change:+.4g} (first order)\n" in text
    assert text.endswith(report.table())


def test_text_without_data():
    text = str(fp.global_prune(cases.mlp(), sparsity=0.0))
    assert text.startswith("magnitude, weight: 0 of 52 units pruned (0.00%), 0 now\n0 of all ")
    assert "weights of the model are masked (0.00%)\nparameter" in text


def test_dict_is_json_and_whole(report):
    again = json.loads(json.dumps(report.to_dict()))
    assert again == report.to_dict()
    for key in (
        "method",
        "granularity",
        "threshold",
        "tied",
        "loss",
        "samples",
        "predicted_loss_change",
        "predicted_gradient_norm_change",
        "pruned",
        "sparsity",
    ):
        assert again[key] == getattr(report, key), key
    assert again["layers"][1]["shape"] == [2, 3, 2, 2]
    assert [layer["pruned"] for layer in again["layers"]] == [layer.pruned for layer in report.layers]


@pytest.mark.parametrize(("suffix", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_plot(report, tmp_path, suffix, magic):
    pytest.importorskip("matplotlib")
    report.plot(tmp_path / f"report.{suffix}")
    assert (tmp_path / f"report.{suffix}").read_bytes().startswith(magic)


def test_plot_without_matplotlib(report, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(
        ImportError, match=r"a plot needs matplotlib: pip install matplotlib \(or torch-flowprune\[plot\]\)"
    ):
        report.plot(tmp_path / "report.png")


def test_an_empty_layer_has_no_sparsity():
    assert fp.Layer("x", (0, 4), 0, 0, 0, 0, 0).sparsity == 0.0
    assert fp.Report("magnitude", "weight", ()).sparsity == 0.0


def test_reports_compare_by_value():
    one, two = (fp.global_prune(cases.mlp(), sparsity=0.5) for _ in range(2))
    assert one == two
    assert one != fp.global_prune(nn.Linear(4, 4), sparsity=0.5)


@pytest.mark.parametrize("options", [{"granularity": "2:4"}, {"granularity": "1:4"}, {"allocation": "row"}])
def test_ties_in_blocks_and_outputs_are_told(options):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for layer in model:
        nn.init.ones_(layer.weight)
    with pytest.warns(fp.TiedScoresWarning, match="kept units have exactly the score of the last pruned unit: mod"):
        report = fp.global_prune(model, sparsity=0.5 if "allocation" in options else None, **options)
    assert report.threshold is None
    assert report.tied == 128 - report.pruned


def test_ties_in_blocks_are_counted_block_by_block():
    """Two of four go; in the second block the order decides one of them, in the third nothing is left to decide."""
    model = nn.Linear(12, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, 2, 3, 4, 5, 7, 7, 8, 1, 1, 2, 2]])
    with pytest.warns(fp.TiedScoresWarning):
        assert fp.global_prune(model, granularity="2:4").tied == 1


def test_ties_of_an_earlier_round_are_told():
    model = nn.Linear(8, 8, bias=False)
    model.weight.data = torch.cat([torch.ones(4, 8), torch.arange(2.0, 34).view(4, 8)])
    with pytest.warns(fp.TiedScoresWarning, match="last pruned unit, 1: model order"):
        report = fp.global_prune(model, sparsity=0.6, rounds=2, schedule="linear")
    assert report.tied == 13

"""The paper's models, its protocol, and the faults of its code that must not come back (docs/results/paper.md)."""

import importlib
import json
import math
import pickle
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import torch_flowprune as fp
from torch_flowprune.inputs.named_parameters.parameters import parameters_of

pytest.importorskip("sklearn")
pytest.importorskip("torchvision")
pytest.importorskip("matplotlib")
ROOT = Path(__file__).parents[2]
SETTING = {
    "width": 0.125,
    "data": "digits",
    "size": 8,
    "subset": 200,
    "goal": 0.6,
    "epochs": 4,
    "batch": 50,
    "train": 180,
}
pytestmark = [
    pytest.mark.skipif(not (ROOT / "benchmarks").exists(), reason="the tests alone, without benchmarks/"),
    pytest.mark.filterwarnings(
        "ignore::torch_flowprune.TiedScoresWarning", "ignore::torch_flowprune.LayerCollapseWarning"
    ),
]


@pytest.fixture
def paper(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    names = (
        "models",
        "data",
        "protocol",
        "size",
        "experiment",
        "claims",
        "trajectories",
        "initialisation",
        "sweep",
        "rows",
        "tables",
        "effects",
        "verdicts",
        "findings",
        "__main__",
    )
    return type("paper", (), {name.strip("_"): importlib.import_module(f"benchmarks.paper.{name}") for name in names})


@pytest.fixture
def tiny(paper):
    """Two hundred digits, 8 x 8."""
    return paper.data.load("digits", subset=200, size=8)


def config(paper, **changes):
    plain = {
        "model": "resnet20",
        "width": 0.125,
        "epochs": 4,
        "rounds": 2,
        "batch": 50,
        "score_samples": 40,
        "score_batch": 20,
        "temperature": 1.0,
    }
    return paper.protocol.Config(**{**plain, **changes})


def run(paper, data, folder, until=None, **changes):
    return paper.protocol.Run(config(paper, **changes), data, folder, progress=False).run(until)


# Models


@pytest.mark.parametrize(
    ("name", "parameters", "norms", "filters"),
    [
        ("vgg13", 9_459_236, 10, 2944),
        ("mobilenet", 3_309_476, 27, 5984),
        ("resnet56", 861_620, 57, 2112),
        ("resnet18", None, 20, None),
        ("resnet34", None, 36, None),
    ],
)
def test_the_counts_of_the_papers_networks(paper, name, parameters, norms, filters):
    with torch.device("meta"):
        model = paper.models.build(name, classes=100)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == norms
    if parameters:
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert sum(module.out_channels for module, _ in paper.models.prunable(model)) == filters


def test_what_may_go(paper):
    resnet, mobilenet = (paper.models.build(name, width=0.125) for name in ("resnet20", "mobilenet"))
    assert all(module is not resnet.features[0] for module, _ in paper.models.prunable(resnet))
    assert {module.groups for module, _ in paper.models.prunable(mobilenet)} == {1}
    everything = {name for name, p in mobilenet.named_parameters() if not name.startswith("linear")}
    follow = paper.models.followers(mobilenet)
    assert everything == {*follow, *(name for names in follow.values() for name in names)}


@pytest.mark.parametrize("name", ["vgg13", "mobilenet"])
def test_a_masked_network_is_counted_as_the_narrower_one(paper, name):
    """Half of the filters of every layer: the parameters and multiply-adds of a net built at half the width."""
    wide, narrow = (paper.models.build(name, width=width) for width in (0.25, 0.125))
    leaders = {f"{n}.weight": m for n, m in wide.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1}
    fp.apply_masks(
        wide,
        {
            n: (torch.arange(m.out_channels) % 2 == 0).view(-1, 1, 1, 1).expand(m.weight.shape)
            for n, m in leaders.items()
        },
    )
    paper.protocol.mask_followers(wide)
    assert paper.size.size(wide, (3, 16, 16)) == paper.size.size(narrow, (3, 16, 16))


def test_a_resnet_keeps_the_channels_that_a_shortcut_brings(paper):
    """Fault 11: what is counted can be built. A filter before an addition stays while the shortcut has its channel."""
    model = paper.models.build("resnet20", width=0.5)
    dense = paper.size.size(model, (3, 8, 8))
    block = model.features[3]
    keep = torch.arange(8) < 2
    fp.apply_masks(model, {"features.3.conv2.weight": keep.view(-1, 1, 1, 1).expand(block.conv2.weight.shape)})
    paper.protocol.mask_followers(model)
    cut = paper.size.size(model, (3, 8, 8))
    assert cut == dense
    fp.apply_masks(model, {"features.3.conv1.weight": keep.view(-1, 1, 1, 1).expand(block.conv1.weight.shape)})
    paper.protocol.mask_followers(model)
    inside = paper.size.size(model, (3, 8, 8))
    assert dense.parameters - inside.parameters == 6 * (8 * 9 + 2) + 6 * 8 * 9
    assert dense.macs - inside.macs == 2 * 6 * 8 * 9 * 64


def test_nothing_comes_out_of_a_pruned_channel(paper):
    model = paper.models.build("vgg13", width=0.125).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
    fp.global_prune(model, "random", 0.5, granularity="filter", parameters=paper.models.prunable(model), min_keep=1)
    paper.protocol.mask_followers(model)
    gone = ~fp.masks(model)["features.0.weight"].flatten(1).any(1)
    out = model.features[:3](torch.randn(2, 3, 8, 8))
    assert gone.any()
    assert (out[:, gone] == 0).all()
    assert (out[:, ~gone] != 0).any()


# Data


def test_three_splits_share_no_image_and_every_class_has_its_share(paper):
    data = paper.data.load("digits", size=8)
    splits = (data.train, data.validation, data.test)
    assert sum(map(len, splits)) == 1797
    keys = [{image.numpy().tobytes() for image in split.images} for split in splits]
    assert not keys[0] & keys[1]
    assert not keys[0] & keys[2]
    assert data.validation.labels.bincount().min() > 10


def test_fault_8_scores_are_taken_over_as_many_images_of_each_class_as_there_are(paper, tiny):
    fewest = int(tiny.train.labels.bincount().min())
    for samples, per_class in ((5, 1), (40, 4), (10 * fewest, fewest), (10**6, fewest)):
        labels = torch.cat([y for _, y in tiny.scoring(samples, 32, 0)])
        assert labels.bincount().tolist() == [per_class] * 10


def test_fault_12_the_images_scored_are_the_same_every_time_and_not_augmented(tiny):
    one, other = (torch.cat([x for x, _ in tiny.scoring(40, 32, 3)]) for _ in range(2))
    assert torch.equal(one, other)
    known = {image.numpy().tobytes() for image in (tiny.train.images.float() / 127.5 - 1)}
    assert all(image.numpy().tobytes() in known for image in one)


def test_an_epoch_is_a_function_of_its_seed(tiny):
    batches = [list(tiny.epoch(50, seed)) for seed in (1, 1, 2)]
    assert all(torch.equal(a, b) for one, two in zip(*batches[:2], strict=True) for a, b in zip(one, two, strict=True))
    assert not torch.equal(batches[0][0][0], batches[2][0][0])
    assert sum(len(y) for _, y in batches[0]) == len(tiny.train)


def test_augmentation_moves_and_mirrors_whole_images(paper):
    image = torch.arange(1, 257).float().view(1, 1, 16, 16).expand(64, 3, -1, -1)
    out = paper.data.augmented(image, torch.Generator().manual_seed(0), flip=True)
    padded = torch.nn.functional.pad(image[0], (2,) * 4)
    crops = [padded[:, i : i + 16, j : j + 16] for i in range(5) for j in range(5)]
    assert all(any(torch.equal(one, crop) or torch.equal(one, crop.flip(2)) for crop in crops) for one in out)
    assert len({one.numpy().tobytes() for one in out}) > 20


def test_a_folder_of_pictures(paper, tmp_path, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    monkeypatch.setattr(paper.data, "CACHE", tmp_path / "cache")
    for part, count in (("train", 8), ("test", 2)):
        for label, colour in (("a", 0), ("b", 255)):
            (tmp_path / part / label).mkdir(parents=True)
            for i in range(count):
                image.new("RGB", (10, 12), (colour, i, 0)).save(tmp_path / part / label / f"{i}.png")
    for _ in range(2):  # the second time from the cache
        data = paper.data.load(str(tmp_path), size=8)
        assert (data.classes, data.shape, len(data.train), len(data.validation), len(data.test)) == (
            2,
            (3, 8, 8),
            14,
            2,
            4,
        )
        assert all((data.train.images[:, 0].flatten(1) == 255 * data.train.labels[:, None]).flatten())
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize(("name", "labels", "classes"), [("cifar10", "labels", 10), ("cifar100", "fine_labels", 100)])
def test_cifar_as_torchvision_keeps_it(paper, name, labels, classes, tmp_path, monkeypatch):
    """Files of torchvision's format, two images a class in training and one in testing.

    Their check sums are not those of CIFAR.
    """
    kind = getattr(importlib.import_module("torchvision.datasets"), name.upper())
    key = {"cifar10": "label_names", "cifar100": "fine_label_names"}[name]
    monkeypatch.setattr(kind, "train_list", [["train", None]])
    monkeypatch.setattr(kind, "test_list", [["test", None]])
    monkeypatch.setattr(kind, "meta", {"filename": "meta", "key": key, "md5": None})
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    source = torch.Generator().manual_seed(0)
    pixels = {
        part: torch.randint(256, (n * classes, 3072), generator=source, dtype=torch.uint8)
        for part, n in (("train", 2), ("test", 1))
    }
    for part, one in pixels.items():
        (folder / part).write_bytes(pickle.dumps({"data": one.numpy(), labels: [i % classes for i in range(len(one))]}))
    (folder / "meta").write_bytes(pickle.dumps({key: [str(i) for i in range(classes)]}))
    data = paper.data.load(name, root=tmp_path, validation=0.5)
    assert (data.name, data.classes, data.shape, data.flip) == (name, classes, (3, 32, 32), True)
    assert [len(split) for split in (data.train, data.validation, data.test)] == [classes] * 3
    order = data.test.labels.argsort()
    assert torch.equal(data.test.images[order], pixels["test"].view(-1, 3, 32, 32)), "channel by channel, row by row"
    assert data.train.labels.bincount().tolist() == [1] * classes


def test_cifar_that_is_not_there(paper, tmp_path):
    with pytest.raises(ValueError, match="no cifar100 under .*: add --download, or say where it is with --root"):
        paper.data.load("cifar100", root=tmp_path)


# Protocol


@pytest.fixture
def tiny_run(paper, tiny, tmp_path):
    return run(paper, tiny, tmp_path / "whole", method="random"), tmp_path


def test_a_run_interrupted_twice_ends_as_one_that_was_not(paper, tiny, tiny_run):
    whole, folder = tiny_run
    for until in (1, 3, None):
        resumed = run(paper, tiny, folder / "parts", until, method="random")
    for found in (whole, resumed):
        del found["environment"]["commit"]
    assert resumed == whole
    one, other = (torch.load(folder / name / "pruned.pt", weights_only=True) for name in ("whole", "parts"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_everything_is_written_down(tiny_run):
    found, folder = tiny_run
    assert json.loads((folder / "whole" / "result.json").read_text()) == found
    assert [entry["epoch"] for entry in found["history"]] == [0, 1, 2, 3, 4]
    curves = {
        "train_loss",
        "train_accuracy",
        "loss",
        "gradient_norm",
        "theta_norm",
        "validation_loss",
        "validation_accuracy",
        "parameters",
        "macs",
        "lr",
    }
    assert curves <= found["history"][1].keys()
    assert [one["epoch"] for one in found["rounds"]] == [1, 2]
    assert all(len(one["layers"]) == 20 for one in found["rounds"])
    assert {"config", "data", "environment", "size", "test"} <= found.keys()


def test_fault_5_a_reloaded_network_is_the_one_that_was_saved(paper, tiny, tiny_run):
    found, folder = tiny_run
    state = torch.load(folder / "whole" / "pruned.pt", weights_only=True)
    model = fp.load_state_dict(paper.models.build("resnet20", 10, 0.125), state).eval()
    x = torch.randn(2, 3, 8, 8)
    again = paper.protocol.Run(config(paper, method="random"), tiny, folder / "whole", progress=False)
    fp.load_state_dict(again.model, again.best["state"])
    assert torch.equal(model(x), again.model.eval()(x))
    assert (
        paper.size.size(model, tiny.shape).parameters
        == found["size"]["pruned"]["parameters"]
        < found["size"]["dense"]["parameters"]
    )


def test_fault_11_validation_chooses_and_the_test_images_are_looked_at_at_the_end(paper, tiny, tmp_path, monkeypatch):
    seen = []
    evaluate = paper.protocol.Run._evaluate
    monkeypatch.setattr(
        paper.protocol.Run,
        "_evaluate",
        lambda self, split: seen.append(split is self.data.test) or evaluate(self, split),
    )
    found = run(paper, tiny, tmp_path)
    assert seen == [False] * 5 + [True, True], "with the last model, and with the one that was chosen"
    assert 0 <= found["test"]["last_epoch_accuracy"] <= 1
    after = [entry for entry in found["history"] if entry["epoch"] >= 2]
    assert found["test"]["validation_accuracy"] == max(entry["validation_accuracy"] for entry in after)


@pytest.mark.parametrize(("rounds", "sparsity"), [(1, 0.75), (5, 0.75), (25, 0.75), (25, 0.95)])
def test_fault_4_the_last_round_ends_at_the_sparsity_asked_for(paper, rounds, sparsity):
    made = config(paper, model="vgg13", rounds=rounds, sparsity=sparsity, epochs=160)
    data = paper.data.load("digits", subset=60, size=8)
    pruner = paper.protocol.Run(made, data, Path("never written"), progress=False).pruner
    assert pruner.goals == tuple(fp.SCHEDULES["paper"](rounds, 0.0, sparsity))
    for _ in range(rounds if rounds <= 5 else 0):
        report = pruner.step([(torch.randn(4, 3, 8, 8), torch.arange(4))])
    assert rounds > 5 or report.pruned == round(sparsity * report.units)


def test_fault_3_a_layer_keeps_its_most_important_filters(paper):
    model = paper.models.build("vgg13", width=0.125)
    pairs = paper.models.prunable(model)
    sizes = {
        f"{name}.weight": m.weight.detach().flatten(1).norm(dim=1)
        for name, m in model.named_modules()
        if isinstance(m, nn.Conv2d)
    }
    fp.global_prune(model, "magnitude", 0.9, granularity="filter", parameters=pairs, min_keep=0.05)
    for name, mask in fp.masks(model).items():
        alive = mask.flatten(1).any(1)
        assert alive.any()
        assert sizes[name][alive].min() > sizes[name][~alive].max()


@pytest.mark.parametrize("fresh", [False, True])
def test_fault_6_momentum_goes_with_its_filters_in_mobilenet_too(paper, tiny, tmp_path, fresh):
    made = config(paper, model="mobilenet", method="taylor", fresh_momentum=fresh, sparsity=0.5, track=True)
    one = paper.protocol.Run(made, tiny, tmp_path, progress=False)
    one.run(1)
    masks, modules = fp.masks(one.model), dict(one.model.named_modules())
    assert any(
        getattr(modules[name.removesuffix(".weight")], "groups", 1) > 1 for name in masks if name.endswith("weight")
    ), "depthwise ones follow"
    for name, target in parameters_of(one.model).items():
        state = one.optimizer.state.get(target.parameter, {})
        assert ("momentum_buffer" in state) != fresh
        if not fresh and name in masks:
            assert (state["momentum_buffer"][~masks[name]] == 0).all()
            assert (state["momentum_buffer"][masks[name]] != 0).any()


@pytest.mark.parametrize(
    "method",
    ["fisher", "gradient_norm_increase", "gradient_norm_preservation", "distance_biased_loss_preservation", "synflow"],
)
def test_fault_7_any_measure_can_be_tracked(paper, tiny, tmp_path, method):
    found = run(paper, tiny, tmp_path, method=method, track=True, track_batches=2, sparsity=0.5)
    assert found["rounds"][-1]["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert method != "fisher" or found["rounds"][-1]["threshold"] >= 0


def test_fault_9_an_unknown_measure_or_folder_is_one_line(paper, capsys, tmp_path):
    assert paper.main.main(["--method", "magnitud", "--data", "digits"]) == 2
    assert paper.main.main(["--data", str(tmp_path)]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "unknown measure 'magnitud'; did you mean 'magnitude'" in first
    assert "has no train/ and no test/" in second


def test_fault_10_the_temperature_asked_for_is_the_one_used(paper):
    assert config(paper, method="grasp").temperature_of_scores == 200
    assert config(paper, method="gradient_norm_preservation").temperature_of_scores == 1
    assert config(paper, method="gradient_norm_preservation", score_temperature=20.0).temperature_of_scores == 20
    assert config(paper, method="taylor", temperature=5.0).temperature_of_scores == 5


def test_fault_11_rounds_that_do_not_fit_are_an_error_and_warm_up_is_as_long_as_it_says(paper):
    with pytest.raises(
        ValueError, match="2 epochs of warm-up and 25 rounds of one epoch do not fit .* give at least 54 epochs"
    ):
        config(paper, warmup=2, rounds=25, epochs=40)
    made = config(paper, warmup=2, rounds=3, epochs=12, lr=1.0, lr_prune=0.5)
    assert [epoch for epoch in range(12) if made.prunes_after(epoch)] == [2, 3, 4]
    assert [made.lr_of(epoch) for epoch in range(12)] == pytest.approx([0.5] * 5 + [1.0] + [0.1] * 3 + [0.01] * 3)


@pytest.mark.parametrize("settle", [False, True])
def test_scores_can_be_taken_with_batch_norm_settled(paper, tiny, tmp_path, settle):
    """After an epoch of four steps the running averages are not those of the weights.

    Where they are taken anew, they are.
    """
    one = paper.protocol.Run(config(paper, settle=settle, width=0.25), tiny, tmp_path, progress=False)
    one._train(0)
    settled = paper.experiment.settled(one.model, tiny)
    loss, _ = paper.experiment.evaluate(settled, one.scoring)
    one._prune()
    assert (one.rounds[0]["loss_before"] == pytest.approx(loss, rel=1e-5)) == settle
    assert all(module.momentum == 0.1 for module in one.model.modules() if isinstance(module, nn.BatchNorm2d))


def test_settled_batch_norm_has_the_statistics_of_the_images(paper, tiny):
    model = paper.experiment.settled(paper.models.build("resnet20", width=0.25), tiny)
    first, norm = (model.get_submodule(f"features.{i}") for i in (0, 1))
    seen = (
        torch.stack([first(images) for images, _ in tiny.train.batches(len(tiny.train))])[0].transpose(0, 1).flatten(1)
    )
    assert torch.allclose(norm.running_mean, seen.mean(1), atol=1e-6)
    assert torch.allclose(norm.running_var, seen.var(1), rtol=1e-4)


def test_thresholds_are_the_sparsities_after_the_rounds(paper, tiny, tmp_path):
    found = run(paper, tiny, tmp_path, thresholds=(0.1, 0.5), sparsity=0.5)
    assert [one["sparsity"] for one in found["rounds"]] == pytest.approx([0.1, 0.5], abs=0.01)
    with pytest.raises(ValueError, match="rounds= or sparsity= differs"):
        config(paper, thresholds=(0.1, 0.5), sparsity=0.6)


def test_from_a_pretrained_checkpoint(paper, tiny, tmp_path):
    dense = run(paper, tiny, tmp_path / "dense", method="none")
    assert dense["rounds"] == []
    state = tmp_path / "dense" / "pruned.pt"
    one = paper.protocol.Run(config(paper, pretrained=str(state)), tiny, tmp_path / "next", progress=False)
    saved = torch.load(state, weights_only=True)
    assert all(torch.equal(value, saved[name]) for name, value in one.model.state_dict().items())


def test_a_folder_of_another_run_is_refused(paper, tiny, tmp_path):
    run(paper, tiny, tmp_path, until=1)
    with pytest.raises(ValueError, match="holds a run with another seed, batch: give another --out, or delete it"):
        run(paper, tiny, tmp_path, seed=1, batch=20)


def test_a_run_on_other_images_is_another_run(paper, tiny, tmp_path):
    """A subset, a size, a split: it went on from the checkpoint, or gave the old result out again."""
    run(paper, tiny, tmp_path / "stopped", until=1)
    run(paper, tiny, tmp_path / "done")
    (tmp_path / "done" / "checkpoint.pt").unlink()
    other = paper.data.load("digits", subset=190, size=8)
    for folder in ("stopped", "done"):
        with pytest.raises(ValueError, match="holds a run with another data, subset, size or validation share: give"):
            run(paper, other, tmp_path / folder)


def test_rows_of_another_setting_or_other_images_are_not_mixed(paper, small, tmp_path, monkeypatch, capsys):
    out = ["--seeds", "0", "--out", str(tmp_path / "out.json")]
    paper.claims.main(["norms", *out])
    before = (tmp_path / "out.json").read_text()
    for what in ("experiment", "setting"):
        monkeypatch.setitem(
            paper.experiment.SETTINGS, "digits", replace(small, lr=0.1 if what == "setting" else small.lr)
        )
        with pytest.raises(SystemExit):
            paper.claims.main(["stability" if what == "experiment" else "norms", *out])
        assert f"holds rows of another {what}: give another --out, or delete it" in capsys.readouterr().err
    assert (tmp_path / "out.json").read_text() == before
    found = json.loads(before)
    assert found["runs"][0]["command"].startswith("norms --seeds 0")
    assert set(found["run_of_part"].values()) == {0}


def test_fault_12_scoring_leaves_the_network_training(paper, tiny, tmp_path):
    one = paper.protocol.Run(config(paper, method="grasp"), tiny, tmp_path, progress=False)
    one.model.train()
    one.pruner.step(one.scoring)
    assert all(module.training for module in one.model.modules())


def test_faults_1_and_2_the_command_runs_without_a_gpu(paper, tmp_path, capsys):
    arguments = [
        "--preset",
        "smoke",
        "--width",
        "0.125",
        "--subset",
        "200",
        "--size",
        "8",
        "--epochs",
        "2",
        "--rounds",
        "1",
        "--quiet",
        "--threads",
        "1",
    ]
    out = ["--out", str(tmp_path), "--device", "cpu"]
    assert paper.main.main([*arguments, *out, "--stop-after", "1"]) == 0
    assert "stopped after epoch 1" in capsys.readouterr().out
    assert paper.main.main([*arguments, *out]) == 0
    assert "test accuracy" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint.pt", "result.json", "pruned.pt", "plot.png"}


# Claims


@pytest.fixture
def small(paper, monkeypatch):
    """The experiments on a net of a few hundred weights, by two measures or as many as the experiment trains."""
    setting = paper.experiment.Setting(
        "resnet20", 0.125, "digits", 8, 200, 0.05, 50, (0, 1), 20, (0.1, 0.5), (1,), 1, 0.5
    )
    monkeypatch.setitem(paper.experiment.SETTINGS, "digits", setting)
    monkeypatch.setattr(paper.experiment, "METHODS", (("magnitude", 1.0), ("gradient_norm_increase", 200.0)))
    monkeypatch.setattr(paper.experiment, "TRAINED", ("magnitude",))
    monkeypatch.setattr(paper.trajectories, "DRAWN", ("magnitude",))
    monkeypatch.setattr(paper.initialisation, "SPARSITIES", (0.75,))
    monkeypatch.setattr(paper.initialisation, "TRAINED_AT", {"weight": 0.75, "channel": 0.75})
    monkeypatch.setattr(paper.initialisation, "MEASURES", paper.experiment.METHODS)
    monkeypatch.setattr(paper.initialisation, "ROUNDS", 2)
    return setting


@pytest.mark.parametrize(
    "experiment", ["expansions", "norms", "stability", "convergence", "trajectories", "initialisation"]
)
def test_the_experiments_run_and_go_on_where_they_stopped(paper, small, experiment, tmp_path):
    claims, out = paper.claims, tmp_path / "out.json"
    claims.main([experiment, "--seeds", "0", "--out", str(out)])
    first = json.loads(out.read_text())
    del first["parts"]["0/done"]
    lost = max(first["parts"])
    kept = first["parts"].pop(lost)
    out.write_text(json.dumps(first))
    claims.main([experiment, "--seeds", "0", "1", "--out", str(out)])
    both = json.loads(out.read_text())["parts"]
    assert both[lost] == kept, "a part that was not there is what it would have been"
    assert both.items() >= first["parts"].items()
    assert {key.split("/")[0] for key in both} == {"0", "1"}
    rows = [row for part in both.values() for row in part]
    assert {row["method"] for row in rows} <= {
        "magnitude",
        "magnitude, by mean",
        "gradient_norm_increase T=200",
        "none",
        "synflow, 20 rounds",
    }
    assert rows
    findings, page = paper.findings, tmp_path / "paper.md"
    page.write_text(f"before\n<!-- made: {experiment} digits, table 1 -->\nold\n<!-- end -->\nafter")
    for _ in range(2):
        findings.main([str(out), "--docs", str(tmp_path)])
    lines = page.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert "old" not in lines
    assert any(line.startswith("| 1 epoch |" if experiment == "norms" else "| magnitude |") for line in lines)
    assert experiment == "norms" or any(" ± " in line for line in lines)
    assert set(lines) - {"before", "after"} - set((tmp_path / "paper_tables.md").read_text().splitlines()) == {
        f"<!-- made: {experiment} digits, table 1 -->", "<!-- end -->",
    }  # fmt: skip
    assert (
        experiment in ("norms", "stability")
        or (tmp_path / f"figures/paper_{experiment}_digits.png").stat().st_size > 1000
    )


def test_a_flow_that_is_followed_ends_where_the_equation_does(paper):
    """θ of a linear layer under half its squared length decays as exp(−t), its square as exp(−2t)."""
    layer = nn.Linear(3, 1, bias=False).double()
    start = layer.weight.square().sum().item()
    x = torch.eye(3, dtype=torch.float64)

    def loss(model, parameters, batch):
        value = model(batch[0]).square().sum() / 2
        return value.item(), torch.autograd.grad(value, parameters)

    times, norms = paper.trajectories.flowing(layer, (x, None), horizon=0.5, points=5, limit=5000, step=1e-3, loss=loss)
    assert times == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert norms == pytest.approx([start * math.exp(-2 * t) for t in times], rel=2e-3)


def test_the_deviation_of_a_trajectory(paper):
    reference = {"norms": [5.0, 6.0, 7.0]}
    assert paper.rows.deviation({"norms": [1.0, 2.0, 3.0]}, reference) == 0
    assert paper.rows.deviation({"norms": [1.0, 1.0, 1.0]}, reference) == 1
    assert paper.rows.deviation({"norms": [1.0, 3.0]}, reference) == 1, "as far as both go"


def test_blocks_that_begin_as_their_shortcut_have_scores_that_are_zero(paper, tiny):
    """Nothing behind γ = 0 reaches the loss.

    Every measure that reads a gradient leaves the order of the model to decide.
    """
    torch.manual_seed(0)
    model = paper.initialisation.NETS["resnet20-zero"].build(10)
    found = fp.scores(
        model,
        ["magnitude", "loss_preservation", "synflow"],
        tiny.scoring(20, 20, 0),
        granularity="filter",
        exclude="linear*",
    )
    branches = [name for name in found["magnitude"] if "conv" in name]
    assert len(branches) == 18
    assert all((found[method][name] == 0).all() for method in ("loss_preservation", "synflow") for name in branches)
    assert all((found["magnitude"][name] > 0).all() for name in branches)


def test_synflow_ranks_a_filter_that_never_answers_above_all_others(paper, tiny):
    """Behind ReLU its variance is 0, and batch norm in eval mode multiplies it by 1 / √ε.

    Measures that read a gradient give it nothing.
    """
    torch.manual_seed(0)
    model = paper.models.build("vgg13", width=0.125)
    with torch.no_grad():
        model.features[28].weight[3] = -1e3  # what comes in is batch norm's, of either sign; its bias makes it positive
        model.features[26].bias.fill_(20.0)
    model = paper.experiment.settled(model, tiny)
    assert model.features[30].running_var[3] == 0
    found = fp.scores(
        model,
        ["synflow", "fisher"],
        tiny.scoring(20, 20, 0),
        granularity="filter",
        parameters=paper.models.prunable(model),
    )
    scores = {method: found[method]["features.28.weight"] for method in found}
    assert scores["synflow"].argmax() == 3
    assert scores["synflow"][3] > 10 * scores["synflow"].sort().values[-2]
    assert scores["fisher"][3] == 0


def test_batch_norm_holds_the_norm_of_its_filters_still_in_train_mode(paper, tiny):
    """θᵀg = 0 for every filter, by the invariance under rescaling; not so in eval mode."""
    torch.manual_seed(0)
    model = paper.experiment.settled(paper.models.build("vgg13", width=0.125), tiny)
    evaluated, trained = paper.trajectories.symmetry(model, tiny.train.batches(100)[0])
    assert trained["filters"] < 1e-2 * evaluated["filters"]
    assert trained["filters"] < 1e-2 * trained["weights"]


def test_runs_that_guess_in_the_end_are_counted(paper):
    ends = {
        ("magnitude", 1): (1.9, 2.3, None),
        ("magnitude", 5): (2.2, 2.0),
        ("random", 1): (1.0, 2.3026, 2.29),
        ("random", 5): (2.31, 2.31),
    }
    parts = {
        f"{seed}/{method}/{rounds}": [
            {"method": method, "rounds": rounds, **({"failed": "nan"} if end is None else {"train_loss": [2.3, end]})}
        ]
        for (method, rounds), some in ends.items()
        for seed, end in enumerate(some)
    }
    found = {"experiment": "protocol", "name": "tiny", "setting": {**SETTING, "model": "vgg13"}, "parts": parts}
    (table,) = paper.tables._guessing(found, [1, 5])
    assert table[4:] == ["| magnitude | 2 of 3 | 0 of 2 |", "| random | 1 of 3 | 2 of 2 |"]
    del parts["1/magnitude/1"], parts["2/magnitude/1"], parts["1/random/1"], parts["0/random/5"], parts["1/random/5"]
    assert paper.tables._guessing(found, [1, 5]) == []


def test_a_sweep_goes_on_with_the_runs_that_are_missing(paper, tmp_path, monkeypatch):
    sweep, out = paper.sweep, tmp_path / "out.json"
    plan = sweep.Plan(config(paper, sparsity=0.5), 8, 200, methods=("magnitude", "random"), rounds=(1, 2))
    monkeypatch.setitem(sweep.PLANS, "tiny", plan)
    arguments = ["--plan", "tiny", "--data", "digits", "--folder", str(tmp_path / "runs"), "--out", str(out)]
    sweep.main([*arguments, "--seeds", "0"])
    first = json.loads(out.read_text())["parts"]
    assert list(first) == ["0/none/1", "0/magnitude/1", "0/magnitude/2", "0/random/1", "0/random/2"]
    monkeypatch.setattr(sweep, "Run", None)
    sweep.main([*arguments, "--seeds", "0"])
    assert json.loads(out.read_text())["parts"] == first
    accuracy, macs, _, left, gains, *_ = paper.tables.TABLES["protocol"](json.loads(out.read_text()))
    value = 100 * first["0/magnitude/2"][0]["test"]["accuracy"]
    assert accuracy[2:5:2] == [
        "| measure | 1 round | 2 rounds |",
        f"| unpruned | {accuracy[4].split()[3]} | {accuracy[4].split()[3]} |",
    ]
    assert accuracy[5].endswith(f"| {value:.1f} |")
    assert "| unpruned | 100.0 | 100.0 |" in macs
    kept = first["0/random/2"][0]["left"]
    assert left[-1] == f"| random | {' | '.join(f'{n:.1f}' for n in kept)} |"
    assert len(kept) == 20
    assert gains[2] == "| measure | 2 rounds − 1 | − random, 1 round | − random, 2 rounds |"
    assert [line.split(" | ")[0] for line in gains[4:]] == ["| magnitude", "| random"]


def test_a_run_that_breaks_down_is_said_to(paper, tiny, tmp_path, monkeypatch):
    def broken(self):
        with torch.no_grad():
            self.model.features[0].weight.fill_(math.nan)
        return prune(self)

    prune = paper.protocol.Run._prune
    monkeypatch.setitem(
        paper.sweep.PLANS,
        "tiny",
        paper.sweep.Plan(config(paper), 8, 200, methods=("magnitude", "random"), rounds=(1, 2)),
    )
    arguments = [
        "--plan",
        "tiny",
        "--data",
        "digits",
        "--folder",
        str(tmp_path / "runs"),
        "--out",
        str(tmp_path / "out.json"),
        "--seeds",
    ]
    paper.sweep.main([*arguments, "0"])
    monkeypatch.setattr(paper.protocol.Run, "_prune", broken)
    paper.sweep.main([*arguments, "1", "--methods", "magnitude", "--rounds", "2"])
    found = json.loads((tmp_path / "out.json").read_text())
    assert "loss of batch 0 is nan" in found["parts"]["1/magnitude/2"][0]["failed"]
    accuracy, *_ = paper.tables.TABLES["protocol"](found)
    line = next(line for line in accuracy if line.startswith("| magnitude"))
    assert line.endswith("(1 of 2 seeds, 1 broke down) |")
    assert [row["seed"] for row in paper.rows.rows_of(found) if row["method"] == "magnitude"] == [0, 0]
    monkeypatch.setitem(
        paper.sweep.PLANS, "tiny", paper.sweep.Plan(config(paper), 8, 200, methods=("magnitud",), rounds=(1,))
    )
    with pytest.raises(ValueError, match="unknown measure 'magnitud'"):
        paper.sweep.main([*arguments, "0"])


def test_differences_are_taken_seed_by_seed(paper):
    """Of the seeds that both have; their mean with its sign, and in how many seeds it has that sign."""
    measured = {
        ("magnitude", 1): (30, 40, 50),
        ("magnitude", 5): (32, 38, 51),
        ("random", 1): (20, 45, 20),
        ("random", 5): (20, 30),
    }
    parts = {
        f"{seed}/{method}/{rounds}": [{"method": method, "rounds": rounds, "test": {"accuracy": points / 100}}]
        for (method, rounds), some in measured.items()
        for seed, points in enumerate(some)
    }
    found = {"experiment": "protocol", "name": "tiny", "setting": {**SETTING, "model": "vgg13"}, "parts": parts}
    rows = paper.rows.rows_of(found)
    (table,) = paper.tables._gains(found, rows, [1, 5])
    assert table[2:] == [
        "| measure | 5 rounds − 1 | − random, 1 round | − random, 5 rounds |",
        "| --- | ---: | ---: | ---: |",
        "| magnitude | +0.3 ± 2.1 (2 of 3) | +11.7 ± 17.6 (2 of 3) | +10.0 ± 2.8 (2 of 2) |",
        "| random | −7.5 ± 10.6 (1 of 2) |  |  |",
    ]


def test_the_pages_say_what_the_results_say(paper):
    """Tables and effects of the documentation are those that the results make."""
    found = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((ROOT / "benchmarks" / "results" / "paper").glob("*.json"))
    ]
    page, tables = (
        (ROOT / "docs" / "results" / name).read_text(encoding="utf-8")
        for name in (paper.findings.PAGE, paper.findings.ALL)
    )
    assert paper.findings.tables_page(found) == tables
    assert paper.findings.filled(page, found) == page
    assert page.count("<!-- made: ") == page.count("<!-- end -->") > 3
    drawn = re.findall(r"\]\((figures/[-\w]+\.png)\)", page)
    assert len(drawn) > 5
    assert [name for name in drawn if not (ROOT / "docs" / "results" / name).exists()] == []


def test_results_of_several_seeds_in_one_file(paper, tmp_path):
    files = []
    for seed in (1, 0):
        rows = [
            {
                "method": "magnitude",
                "samples": 50,
                "spearman": 1 / 3,
                "overlap": 0.5 + seed,
                "zero": 0.0,
                "others": {"l1": math.inf},
            }
        ]
        setting = {**SETTING, "model": "vgg13"}
        files.append(tmp_path / f"{seed}.json")
        files[-1].write_text(
            json.dumps(
                {
                    "experiment": "stability",
                    "name": "digits",
                    "setting": setting,
                    "environment": {"commit": f"c{seed}", "threads": 1},
                    "parts": {f"{seed}/5": rows, f"{seed}/done": []},
                }
            )
        )
    paper.findings.main([*map(str, files), "--merge", str(tmp_path / "both.json")])
    found = json.loads((tmp_path / "both.json").read_text())
    assert list(found["parts"]) == ["0/5", "1/5"]
    assert found["environment"] == {"commit": "c1, c0", "threads": 1}
    assert found["parts"]["0/5"][0]["spearman"] == 0.333333
    assert found["parts"]["0/5"][0]["others"] == {"l1": None}, "a JSON holds no infinity"
    (table,) = paper.tables.TABLES["stability"](found)
    assert table[-1] == "| magnitude | 0.33 ± 0 | 1 ± 0.7 | 0.0% |"
    assert "2 seeds" in table[0]


def test_runs_of_several_networks_in_one_table(paper, tiny_run, tmp_path):
    """A result of the command is taken, too; of each network a line."""
    found, _ = tiny_run
    assert paper.findings.merged([found])["parts"].keys() == {"0/random/2"}
    files = []
    for model in ("resnet20", "vgg13"):
        files.append(tmp_path / f"{model}.json")
        files[-1].write_text(
            json.dumps({**paper.findings.merged([found]), "name": model, "setting": {**SETTING, "model": model}})
        )
    paper.findings.main([*map(str, files), "--merge", str(tmp_path / "both.json")])
    (table,) = paper.tables.TABLES["networks"](json.loads((tmp_path / "both.json").read_text()))
    parameters = f"{found['size']['pruned']['parameters']:,} of {found['size']['dense']['parameters']:,}"
    assert [line.split(" | ")[0] for line in table[-2:]] == ["| resnet20", "| vgg13"]
    assert all(parameters in line and f"| {100 * found['test']['accuracy']:.1f} |" in line for line in table[-2:])
    assert "16 steps" in table[0]


@pytest.mark.parametrize(
    ("agreeing", "count", "expected"),
    [
        (3, 3, "holds weakly"),  # p = 0.25
        (5, 5, "holds weakly"),  # p = 0.06
        (6, 6, "holds"),  # p = 0.03
        (8, 9, "holds"),  # p = 0.04
        (7, 9, "holds weakly"),  # p = 0.18
        (6, 9, "not seen"),
        (3, 6, "not seen"),
        (1, 6, "the opposite, weakly"),
        (0, 6, "the opposite holds"),
        (0, 3, "the opposite, weakly"),
    ],
)
def test_a_verdict_is_by_the_sign_of_networks(paper, agreeing, count, expected):
    assert paper.verdicts.word(agreeing, count) == expected


def test_chance_is_that_of_coins(paper):
    assert paper.verdicts.sign_test(9, 9) == 2 / 2**9
    assert paper.verdicts.sign_test(1, 9) == paper.verdicts.sign_test(8, 9) == 2 * 10 / 2**9
    assert paper.verdicts.sign_test(2, 4) == 1.0


def test_ages_of_one_network_are_one_unit(paper):
    """Three ages on three seeds are three networks, each with its mean."""
    losses = {"magnitude": {1: 2.0, 5: 1.0}, "loss_preservation": {1: 1.0, 5: 3.0}}
    parts = {
        f"{seed}/{method}/{epoch}": [
            {"method": method, "seed": seed, "epoch": epoch, "validation": [[9, 0], [loss + seed, 0]]}
        ]
        for method, by_epoch in losses.items()
        for epoch, loss in by_epoch.items()
        for seed in range(3)
    }
    found = {"experiment": "convergence", "name": "digits", "parts": parts}
    (verdict,) = paper.verdicts.verdicts({"convergence digits": found})
    assert verdict.networks == {"convergence digits": {0: -0.5, 1: -0.5, 2: -0.5}}
    assert verdict.line()[2:] == ["3 of 3", "0.25", "digits -0.5 [-0.5, -0.5]", "**holds weakly**"]


def test_the_interval_is_students(paper):
    values = [1.0, 2.0, 6.0]
    half = 4.303 * (7.0 / 3) ** 0.5
    assert paper.verdicts.interval(values) == f"3 [{3 - half:.2g}, {3 + half:.2g}]"

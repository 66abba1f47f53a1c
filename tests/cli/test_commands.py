"""The command line as a user meets it: what it writes loads back, and what goes wrong says so in one line."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import torch_flowprune as fp
from torch_flowprune.cli import demo
from torch_flowprune.cli.arguments import COMMANDS, parser
from torch_flowprune.cli.commands import main
from torch_flowprune.cli.help_examples import EXAMPLES
from torch_flowprune.cli.option_spelling import as_options
from torch_flowprune.cli.sources import image_folder

timm = pytest.importorskip("timm")
pytest.importorskip("torchvision")

MODEL = ("test_efficientnet", "--random-init", "--num-classes", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two classes of four noise pictures, as an image folder."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    for label in ("cats", "dogs"):
        (folder / label).mkdir()
        for i in range(4):
            pixels = torch.randint(256, (40, 40, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / label / f"{i}.png")
    return folder


@pytest.fixture
def run(capsys):
    """Run a command that must succeed; what it printed."""

    def command(*arguments):
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out + err

    return command


def loaded(path, name="test_efficientnet", classes=2):
    return timm.create_model(name, checkpoint_path=str(path), num_classes=classes)


def initial(seed=0):
    torch.manual_seed(seed)
    return timm.create_model("test_efficientnet", num_classes=2).state_dict()


def zeros(model):
    return {name: int((value == 0).sum()) for name, value in model.named_parameters()}


# --- prune and score -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ("--sparsity", "0.5"),
        ("--sparsity", "0.3", "--method", "synflow", "--min-keep", "4"),
        ("--sparsity", "0.3", "--method", "random", "--scope", "layer"),
        ("--sparsity", "0.5", "--method", "taylor", "--granularity", "filter", "--min-keep", "0.1", "--data"),
        (
            "--sparsity",
            "0.5",
            "--method",
            "grasp",
            "--temperature",
            "200",
            "--mode",
            "train",
            "--rounds",
            "2",
            "--schedule",
            "paper",
            "--data",
        ),
        (
            "--sparsity",
            "0.5",
            "--method",
            "fisher",
            "--samples",
            "5",
            "--batch-size",
            "2",
            "--min-keep",
            "4",
            "--exclude",
            "classifier*",
            "--data",
        ),
        ("--sparsity", "0.3", "--granularity", "channel", "--min-keep", "1"),
        ("--granularity", "2:4", "--exclude", "conv_stem*", "*conv_dw*"),
    ],
    ids=" ".join,
)
def test_what_prune_writes_loads_back_with_its_zeros(options, run, pictures, tmp_path):
    options = (*options, pictures) if options[-1] == "--data" else options
    out, report, plot = tmp_path / "out.safetensors", tmp_path / "report.json", tmp_path / "plot.png"
    text = run("prune", *MODEL, *options, "--out", out, "--report", report, "--plot", plot)

    layers = json.loads(report.read_text())["layers"]
    model, before = loaded(out), initial()
    found = zeros(model)
    for layer in layers:  # a group of channels may have several producers, and goes by the name of the first
        zeroed, said = found[layer["name"]], layer["weights_pruned"]
        assert zeroed == said or (layer["weights"] > before[layer["name"]].numel() and zeroed < said), layer
    assert sum(layer["weights_pruned"] for layer in layers) > 0
    for name, value in model.state_dict().items():
        assert torch.equal(torch.where(value == 0, 0, before[name]), value), name
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert f"load it with timm.create_model('test_efficientnet', checkpoint_path='{out}', num_classes=2)" in text


def test_score_once_prune_many(run, pictures, tmp_path):
    scores = tmp_path / "scores.safetensors"
    text = run("score", *MODEL, "--method", "loss_preservation", "--data", pictures, "--out", scores)
    assert "loss_preservation scores of 96,840 units (weight)" in text
    for amount in (("--sparsity", 0.2, "--min-keep", 2), ("--sparsity", 0.7, "--min-keep", 0.1)):
        from_scores, at_once = tmp_path / "from_scores.safetensors", tmp_path / "at_once.safetensors"
        run("prune", *MODEL, *amount, "--scores", scores, "--out", from_scores)
        run("prune", *MODEL, *amount, "--method", "loss_preservation", "--data", pictures, "--out", at_once)
        for name, value in loaded(from_scores).state_dict().items():
            assert torch.equal(value, loaded(at_once).state_dict()[name]), name


def test_a_checkpoint_is_pruned_as_it_is(run, tmp_path):
    from safetensors.torch import save_file

    state = initial(seed=7)
    save_file(state, tmp_path / "seven.safetensors")
    run(
        "prune",
        "test_efficientnet",
        "--checkpoint",
        tmp_path / "seven.safetensors",
        "--num-classes",
        2,
        "--sparsity",
        0,
        "--out",
        tmp_path / "out.safetensors",
    )
    for name, value in loaded(tmp_path / "out.safetensors").state_dict().items():
        assert torch.equal(value, state[name]), name


def test_theta0_is_a_checkpoint(run, pictures, tmp_path):
    from safetensors.torch import save_file

    save_file(initial(seed=7), tmp_path / "start.safetensors")
    method = ("--method", "distance_biased_loss_preservation", "--theta0", tmp_path / "start.safetensors")
    text = run("score", *MODEL, *method, "--data", pictures)
    assert "distance_biased_loss_preservation scores of 96,840 units" in text


@pytest.mark.parametrize(("seed", "same"), [(0, True), (1, False)])
def test_the_seed_fixes_random(run, tmp_path, seed, same):
    for name, number in (("a", 0), ("b", seed)):
        run(
            "prune",
            *MODEL,
            "--method",
            "random",
            "--sparsity",
            0.5,
            "--seed",
            number,
            "--out",
            tmp_path / f"{name}.safetensors",
        )
    masks = [
        {key: value == 0 for key, value in loaded(tmp_path / f"{name}.safetensors").named_parameters()} for name in "ab"
    ]
    assert all(torch.equal(masks[0][key], masks[1][key]) for key in masks[0]) is same


def test_nothing_asked_for_is_said(run):
    assert "nothing was written: --out FILE.safetensors keeps the pruned weights" in run(
        "prune", *MODEL, "--sparsity", "0.5"
    )


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line(run):
    text = run("prune", *MODEL, "--sparsity", "1", "--include", "classifier", "--allow-collapse")
    assert re.search(
        r"^LayerCollapseWarning: nothing is left of classifier.weight: .*--min-keep keeps some units of every layer$",
        text,
        re.MULTILINE,
    )


@pytest.mark.filterwarnings("ignore::torch_flowprune.LayerCollapseWarning")
def test_a_dead_model_is_not_written(capsys, tmp_path):
    out = tmp_path / "out.safetensors"
    command = ["prune", *MODEL, "--sparsity", "1", "--include", "classifier", "--out", str(out)]
    assert main(command) == 2
    assert "nothing is left of classifier.weight: the model is dead, and was not written" in capsys.readouterr().err
    assert not out.exists()
    assert main([*command, "--allow-collapse"]) == 0
    assert out.exists()


@pytest.mark.filterwarnings("ignore::torch_flowprune.LayerCollapseWarning")
def test_the_command_line_takes_allocations(run, tmp_path):
    report = tmp_path / "report.json"
    options = ("--allocation", "lamp", "--max-sparsity", 0.75, "--round-to", 2, "--granularity", "filter")
    run("prune", *MODEL, "--sparsity", 0.3, *options, "--report", report)
    layers = json.loads(report.read_text())["layers"]
    assert all((layer["units"] - layer["pruned"]) % 2 == 0 for layer in layers if layer["pruned"])
    assert {layer["why"] for layer in layers} & {"lamp, a multiple of 2"}
    run("prune", *MODEL, "--sparsity", 0.3, "--granularity", "filter", "--normalize", "none", "--report", report)
    assert "global" in {layer["why"] for layer in json.loads(report.read_text())["layers"]}


@pytest.mark.filterwarnings("ignore::torch_flowprune.LayerCollapseWarning")
def test_the_command_line_takes_uniform(run, tmp_path):
    report = tmp_path / "report.json"
    run("prune", *MODEL, "--sparsity", 0.3, "--granularity", "channel", "--uniform", "--report", report)
    assert all(layer["why"].endswith(", uniform") for layer in json.loads(report.read_text())["layers"])


def test_the_command_line_takes_blocks_out(run, tmp_path):
    small = tmp_path / "small.safetensors"
    run("prune", "test_vit", "--random-init", "--sparsity", 0.5, "--granularity", "block", "--shrink", "--out", small)
    model = fp.load_pruned(timm.create_model("test_vit"), small)
    assert ["zeros, since a branch is gone"] in fp.replaced_modules(model).values()
    dense = sum(value.numel() for value in timm.create_model("test_vit").parameters())
    assert sum(value.numel() for value in model.parameters()) < 0.8 * dense


def test_the_command_line_takes_amounts(run, tmp_path):
    report = tmp_path / "report.json"
    amounts = ("--at-most", "parameters=50000", "memory=2e6", "--granularity", "channel")
    text = run("prune", *MODEL, *amounts, "--report", report)
    spent = {one["cost"]: one for one in json.loads(report.read_text())["spent"]}
    assert spent["parameters"]["left"] <= 50_000 < spent["parameters"]["dense"]
    assert spent["memory"]["left"] <= spent["memory"]["asked"] == 2e6
    assert "at most 50,000 asked for" in text


def test_synset_folders_get_imagenet_labels(tmp_path):
    for name in ("n01443537", "n01440764"):
        (tmp_path / name).mkdir()
    labels = image_folder._labels("--data", tmp_path, timm.create_model("test_vit"))
    assert [labels(0), labels(1)] == [0, 1]
    (tmp_path / "n02102040").mkdir()
    assert image_folder._labels("--data", tmp_path, timm.create_model("test_vit"))(2) == 217


# --- demo ------------------------------------------------------------------------------------------------------------

TINY = {"methods": ("magnitude", "gradient_norm_increase"), "sparsities": (0.5,), "epochs": 1, "tuning_epochs": 1}


def test_demo(run, tmp_path):
    pytest.importorskip("sklearn")
    out = tmp_path / "demo.png"
    text = run(
        "demo",
        "--out",
        out,
        "--methods",
        *TINY["methods"],
        "--sparsities",
        0.5,
        1,
        "--epochs",
        1,
        "--tuning-epochs",
        1,
        "--granularity",
        "filter",
    )
    assert out.read_bytes().startswith(b"\x89PNG")
    assert len(re.findall(r"^magnitude +\d+%", text, re.MULTILINE)) == 2
    assert len(re.findall(r"^gradient_norm_increase +\d+%", text, re.MULTILINE)) == 2
    assert re.search(r"^magnitude +100% .*a layer is empty$", text, re.MULTILINE)


def test_demo_repeats_and_leaves_the_threads_alone(tmp_path):
    pytest.importorskip("sklearn")
    threads = torch.get_num_threads()
    first, second = (demo.run(demo.Settings(seed=3, out=tmp_path / "demo.png", **TINY)) for _ in range(2))
    assert first == second
    assert torch.get_num_threads() == threads


def test_the_demos_prediction_is_the_reports():
    pytest.importorskip("sklearn")
    train, _ = demo.digits(0)
    model = demo.network()
    dense = demo.point(model, train)
    report = fp.global_prune(model, "taylor", 0.3, data=train)
    assert demo.first_order(dense, demo.point(model, train)) == pytest.approx(report.predicted_loss_change, rel=1e-4)


def test_a_terminal_that_lacks_a_sign_and_a_pipe_that_is_closed_lose_no_file(tmp_path):
    for number, (encoding, tail) in enumerate((("ascii", "| cat"), ("utf-8", "| true"))):
        out = tmp_path / f"{number}.safetensors"
        command = f"{sys.executable} -m torch_flowprune prune {' '.join(MODEL)} --sparsity 0.3 --out {out} {tail}"
        environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUNBUFFERED": "1"}
        done = subprocess.run(command, check=False, shell=True, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert out.exists(), done.stderr


def test_an_output_that_is_a_folder_is_told_before_anything_is_computed(tmp_path, capsys):
    (tmp_path / "out.safetensors").mkdir()
    assert main(["prune", *MODEL, "--sparsity", "0.5", "--out", str(tmp_path / "out.safetensors")]) == 2
    out, err = capsys.readouterr()
    assert "out.safetensors: this is a folder; expected the name of a file" in err
    assert not out


# --- files of its own -------------------------------------------------------------------------------------------------


def share_of_zeros(path):
    from safetensors.torch import load_file

    weights = [value for value in load_file(path).values() if value.dim() > 1]
    return sum(int((value == 0).sum()) for value in weights) / sum(value.numel() for value in weights)


def test_its_own_file_is_pruned_on_from_where_it_is(run, tmp_path):
    first, second, third = (tmp_path / f"{number}.safetensors" for number in (1, 2, 3))
    run("prune", *MODEL, "--method", "random", "--sparsity", 0.5, "--min-keep", 1, "--out", first)
    again = ("prune", "test_efficientnet", "--num-classes", 2, "--method", "random", "--seed", 5, "--checkpoint")
    text = run(*again, first, "--sparsity", 0.5, "--min-keep", 1, "--out", second)
    assert "(50.00%), 0 now" in text
    assert share_of_zeros(second) == share_of_zeros(first) == pytest.approx(0.5, abs=1e-3)
    run(*again, second, "--sparsity", 0.6, "--min-keep", 1, "--out", third)
    assert share_of_zeros(third) == pytest.approx(0.6, abs=1e-3)


@pytest.mark.parametrize("kind", ["ours", "ours.pt", "torch's.pt"])
def test_states_with_masks_are_read_with_them(kind, run, tmp_path):
    from safetensors.torch import save_file
    from torch.nn.utils import prune

    model = timm.create_model("test_efficientnet", num_classes=2)
    if kind == "torch's.pt":
        layers = [
            (module, "weight") for module in model.modules() if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))
        ]
        prune.global_unstructured(layers, prune.RandomUnstructured, amount=0.5)
        path = tmp_path / "own.pt"
        torch.save(model.state_dict(), path)
    else:
        fp.global_prune(model, "random", 0.5, min_keep=1)
        path = tmp_path / ("own.pt" if kind == "ours.pt" else "own.safetensors")
        (torch.save if kind == "ours.pt" else save_file)(fp.state_dict(model), path)
    command = ("prune", "test_efficientnet", "--num-classes", 2, "--checkpoint", path, "--method", "random")
    assert "(50.00%), 0 now" in run(*command, "--sparsity", 0.5, "--min-keep", 1)


def test_a_shrunk_model_is_written_loaded_and_exported(run, tmp_path):
    pytest.importorskip("onnxscript")
    if torch.__version__ < "2.7":
        pytest.skip("torch 2.6 cannot write a batch norm for the onnxscript of today")
    small, onnx = tmp_path / "small.safetensors", tmp_path / "small.onnx"
    options = ("--granularity", "channel", "--cost", "flops", "--shrink", "--out", small, "--onnx", onnx)
    text = run("prune", *MODEL, "--sparsity", 0.5, *options)
    assert f"torch_flowprune.load_pruned(timm.create_model('test_efficientnet', num_classes=2), '{small}')" in text
    model = fp.load_pruned(timm.create_model("test_efficientnet", num_classes=2), small)
    whole = sum(value.numel() for value in timm.create_model("test_efficientnet", num_classes=2).parameters())
    assert sum(value.numel() for value in model.parameters()) < whole
    assert onnx.stat().st_size > 0
    assert f"{onnx} (ONNX)" in text
    command = ("prune", "test_efficientnet", "--num-classes", 2, "--checkpoint", small, "--sparsity", 0.25)
    assert "25.00%" in run(*command)


def test_models_of_standardised_kernels_are_written(run, tmp_path):
    out = tmp_path / "out.safetensors"
    text = run("prune", "nf_resnet26", "--random-init", "--num-classes", 2, "--sparsity", 0.3, "--out", out)
    assert "load_pruned" in text
    torch.manual_seed(0)
    model = timm.create_model("nf_resnet26", num_classes=2)
    fp.global_prune(model, "magnitude", 0.3)
    again = fp.load_pruned(timm.create_model("nf_resnet26", num_classes=2), out)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(again.eval()(x), model.eval()(x))


def test_the_same_command_writes_the_same_bytes(run, tmp_path):
    written = set()
    for number in range(8):
        run("prune", *MODEL, "--sparsity", 0.5, "--out", tmp_path / f"{number}.safetensors")
        written.add((tmp_path / f"{number}.safetensors").read_bytes())
    assert len(written) == 1


# --- compare and diagnose ---------------------------------------------------------------------------------------------


def test_compare(run, pictures, tmp_path):
    report, plot = tmp_path / "report.json", tmp_path / "plot.png"
    options = ("--methods", "magnitude", "snip", "--sparsities", 0.3, 0.6, "--held-out", pictures)
    text = run("compare", *MODEL, "--data", pictures, *options, "--report", report, "--plot", plot)
    assert len(re.findall(r"^(?:magnitude|snip) +[36]0\.0%", text, re.MULTILINE)) == 4
    assert "rank correlation" in text
    assert len(json.loads(report.read_text())["outcomes"]) == 4
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_diagnose(run, pictures, tmp_path):
    report, plot = tmp_path / "report.json", tmp_path / "plot.png"
    text = run("diagnose", *MODEL, "--data", pictures, "--batch-size", 2, "--report", report, "--plot", plot)
    assert "zeros and stability are of the loss_preservation scores" in text
    assert json.loads(report.read_text())["samples"] == 8
    assert plot.read_bytes().startswith(b"\x89PNG")


# --- what goes wrong -------------------------------------------------------------------------------------------------

ERRORS = [
    ("prune resnet81 --sparsity 0.5", "timm has no model 'resnet81'; nearest: resnet18", "timm.list_models()"),
    ("prune MODEL", "--sparsity is missing: expected a fraction from 0 to 1, such as --sparsity 0.9"),
    ("prune MODEL --at-most latency", "argument --at-most: expected COST=AMOUNT, such as latency=12.5, got 'latency'"),
    ("prune MODEL --at-most flops=-1", "expected COST=AMOUNT, such as latency=12.5, got 'flops=-1'"),
    ("prune MODEL --at-most watts=1", "at_most: 'watts' should be one of parameters, flops, memory, latency"),
    (
        "prune MODEL --sparsity 1.5",
        "argument --sparsity: write 0.015: expected a fraction from 0 to 1, such as 0.9, got '1.5'",
    ),
    ("prune MODEL --sparsity half", "expected a fraction from 0 to 1, such as 0.9, got 'half'"),
    ("prune MODEL --sparsity nan", "expected a fraction from 0 to 1, such as 0.9, got 'nan'"),
    ("prune MODEL --sparsity 0.5 --rounds 0", "argument --rounds: expected a whole number of at least 1, got '0'"),
    ("prune MODEL --sparsity 0.5 --min-keep -1", "argument --min-keep: expected"),
    (
        "prune MODEL --sparsity 0.5 --data /no/such",
        "--data /no/such: there is no such folder; expected one with a folder of images for each class",
    ),
    (
        "prune MODEL --sparsity 0.5 --method snip",
        "snip reads g of a loss, and no data was given: pass --data DIR",
        "magnitude, l1, random, synflow",
    ),
    ("score MODEL --method grasp", "grasp reads Hg of a loss, and no data was given: pass --data DIR"),
    ("score MODEL --method snpi", "unknown measure 'snpi'; did you mean 'snip'"),
    (
        "score MODEL --method distance_biased_loss_preservation --data PICTURES",
        "reads theta0, the weights at initialisation: pass --theta0 FILE",
    ),
    ("score MODEL --granularity filters", "unknown granularity 'filters': expected 'weight', 'filter'"),
    ("score MODEL --granularity 4:2", "granularity '4:2' keeps 4 of 2: expected 0 < n < m, as in '2:4'"),
    ("score MODEL --include hed", "--include hed matches no parameter"),
    ("score test_efficientnet --checkpoint /no/such.pt", "--checkpoint /no/such.pt: there is no such file"),
    (
        "score test_efficientnet --checkpoint CHECKPOINT",
        "does not load into test_efficientnet",
        "if it is of another number of classes, pass --num-classes N",
    ),
    ("score test_efficientnet --checkpoint CHECKPOINT --random-init", "not allowed with argument --checkpoint"),
    (
        "score test_efficientnet --random-init --method taylor --data PICTURES",
        "each of the model's 1000 classes, found 2 (cats, dogs)",
    ),
    ("prune MODEL --scores /no/such --sparsity 0.5", "--scores /no/such: there is no such file"),
    (
        "prune MODEL --scores CHECKPOINT --sparsity 0.5",
        "other.safetensors holds no scores: expected a file written by Scores.save",
    ),
    (
        "prune MODEL --scores PICTURES/cats/0.png --sparsity 0.5",
        "0.png holds no scores: expected a file written by Scores.save",
    ),
    (
        "score test_efficientnet.nonsense",
        "timm has no weights called 'test_efficientnet.nonsense': expected one of test_efficientnet.r160_in1k",
    ),
    ("prune MODEL --sparsity 0.5 --out /no/such/out.safetensors", "there is no folder /no/such; make it first"),
    ("prune MODEL --sparsity 0.5 --out out.pt", "--out out.pt: expected a file name that ends in .safetensors"),
    ("prune MODEL --sparsity 0.5 --report r.txt", "--report r.txt: expected a file name that ends in .json"),
    ("prune MODEL --sparsity 0.5 --plot p.txt", "--plot p.txt: expected a file name that ends in .png or .svg or .pdf"),
    ("demo --out demo.txt", "--out demo.txt: expected a file name that ends in .png or .svg or .pdf"),
    ("demo --granularity block", "argument --granularity: invalid choice: 'block'"),
    ("prune MODEL --sparsity 50", "write 0.5: expected a fraction from 0 to 1, such as 0.9, got '50'"),
    ("prune MODEL --sparsity 90%", "write 0.9: expected a fraction from 0 to 1, such as 0.9, got '90%'"),
    ("prune MODEL --sparsity 0,9", "write 0.9: expected a fraction from 0 to 1, such as 0.9, got '0,9'"),
    ("prune MODEL --sparsity 0.5%", "write 0.005: expected a fraction from 0 to 1, such as 0.9, got '0.5%'"),
    ("compare MODEL --sparsities 0.5 80", "write 0.8: expected a fraction from 0 to 1, such as 0.9, got '80'"),
    ("prnue MODEL", "no command is called 'prnue': did you mean prune? The commands are demo, prune, score, compare"),
    ("x", "no command is called 'x': The commands are demo"),
    ("prune MODEL --sparsity 0.5 --mehtod l1", "prune: unknown --mehtod l1: did you mean --method?"),
    ("prune MODEL --sparsity 0.5 --zzz", "prune: unknown --zzz (torch-flowprune prune --help lists the options)"),
    ("prune test_efficientnett --sparsity 0.5", "timm has no model 'test_efficientnett'; nearest: test_efficientnet"),
    ("prune test_efficientnet --random-init --sparsity 0.5 --device foo", "--device foo: there is no such device here"),
    ("prune test_efficientnet --random-init --sparsity 0.5 --device cuda:99", "no such device here; expected cpu"),
    (
        "prune MODEL --sparsity 0.5 --seed 100000000000000000000000",
        "expected a whole number from 0 to 9223372036854775807",
    ),
    ("prune MODEL --sparsity 0.5 --workers -1", "--workers: expected"),
    (
        "prune MODEL --sparsity 0.5 --rounds 1000000000",
        "--rounds 1000000000 are more than there are units to prune, 96,840: expected that many at most",
    ),
    ("prune MODEL --sparsity 0.5 --out /proc/x.safetensors", "/proc/x.safetensors: it cannot be written here"),
    (f"prune MODEL --sparsity 0.5 --out {'x' * 300}.safetensors", "it cannot be written here (File name too long)"),
    ("prune MODEL --sparsity 0.5 --onnx small.pt", "--onnx small.pt: expected a file name that ends in .onnx"),
    ("prune MODEL --sparsity 0.5 --shrink", "the units are weights: expected --granularity channel"),
    (
        "prune MODEL --sparsity 0.5 --scores SCORES --rounds 3",
        "--rounds 3 computes new scores before each round, and --scores are fixed",
    ),
    ("compare MODEL", "--data is missing: compare measures a loss; expected --data DIR"),
    ("diagnose MODEL", "--data is missing: diagnose measures a loss; expected --data DIR"),
    ("prune bert-base-uncased --sparsity 0.5", "timm has no model 'bert-base-uncased'; for a model of another library"),
    (
        "prune gpt2 --sparsity 0.5",
        "use torch-flowprune prune-checkpoint DIR, which prunes its files",
        "hf download gpt2",
    ),
    (
        "prune MODEL --sparsity 0.5 --method snip --data PICTURES/cats",
        "cats: expected one folder of images per class, found no folder: put the images of each class into a folder",
    ),
    (
        "prune MODEL --sparsity 0.5 --cost flops",
        "--cost flops counts what shrink leaves of the model",
        "leave --cost out",
    ),
    ("prune-checkpoint nowhere --sparsity 0.5 --out x", "hf download NAME --local-dir DIR"),
    ("compare MODEL --data PICTURES --held-out /no/such", "--held-out /no/such: there is no such folder"),
    (
        "prune MODEL --sparsity 0.5 --method snip --data DAMAGED",
        "1.png of --data cannot be read (UnidentifiedImageError): repair it",
    ),
    (
        "prune MODEL --sparsity 0.5 --method snip --data DAMAGED --workers 1",
        "1.png of --data cannot be read (UnidentifiedImageError): repair it",
    ),
]


@pytest.mark.parametrize(
    ("line", "parts"), [(line, parts) for line, *parts in ERRORS], ids=[line or "no command" for line, *_ in ERRORS]
)
def test_errors_are_one_line_and_code_2(line, parts, capsys, pictures, tmp_path):
    from safetensors.torch import save_file

    shutil.copytree(pictures, tmp_path / "damaged")
    (tmp_path / "damaged" / "cats" / "1.png").write_text("junk")
    fp.scores(timm.create_model("test_efficientnet", num_classes=2)).save(tmp_path / "s.safetensors")

    save_file({"stem.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    line = (
        line.replace("MODEL", " ".join(MODEL))
        .replace("PICTURES", str(pictures))
        .replace("DAMAGED", str(tmp_path / "damaged"))
        .replace("SCORES", str(tmp_path / "s.safetensors"))
        .replace("CHECKPOINT", str(tmp_path / "other.safetensors"))
    )
    try:
        code = main(line.split())
    except SystemExit as stop:
        code = stop.code
    text = capsys.readouterr().err
    assert code == 2
    assert all(part in text for part in parts), text
    assert "Traceback" not in text
    assert len(text.splitlines()) == 1


def test_an_unreachable_hub_names_the_ways_out(capsys, monkeypatch):
    def unreachable(name, pretrained=False, **_):
        assert pretrained
        raise FileNotFoundError("the file is not in the cache and the hub cannot be reached.\nmore lines")

    monkeypatch.setattr(timm, "create_model", unreachable)
    assert main(["score", "test_efficientnet"]) == 2
    text = capsys.readouterr().err
    assert (
        "the pretrained weights of test_efficientnet could not be loaded: the file is not in the cache and the hub "
        "cannot be reached; pass" in text
    )
    assert "--checkpoint FILE" in text
    assert "--random-init" in text


@pytest.mark.filterwarnings("ignore::torch_flowprune.LayerCollapseWarning")
def test_a_folder_that_timm_wrote_is_a_model(run, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = timm.create_model("test_resnet", num_classes=3)
    timm.models.save_for_hf(model, "mine", model_config={"num_classes": 3})
    out = tmp_path / "out.safetensors"
    text = run("prune", "mine", "--sparsity", 0.5, "--out", out)
    assert f"timm.create_model('local-dir:mine', checkpoint_path='{out}')" in text
    again = fp.load_pruned(timm.create_model("local-dir:mine"), out)
    assert torch.equal(again.fc.weight, model.fc.weight * fp.masks(again)["fc.weight"])
    (tmp_path / "other").mkdir()
    for name in ("other", "./other/"):
        assert main(["prune", name, "--random-init", "--sparsity", "0.5"]) == 2
        text = capsys.readouterr().err
        assert f"{name} could not be loaded as a model of timm" in text and f"prune-checkpoint {name}, which" in text
        assert len(text.splitlines()) == 1


def test_a_name_with_an_owner_is_one_of_the_hub(capsys, monkeypatch):
    asked = []

    def unreachable(name, pretrained=False, **_):
        asked.append(name)
        raise KeyError("architecture")

    monkeypatch.setattr(timm, "create_model", unreachable)
    assert main(["prune", "microsoft/resnet-50", "--sparsity", "0.5"]) == 2
    assert asked == ["hf-hub:microsoft/resnet-50"]
    text = capsys.readouterr().err
    said = "microsoft/resnet-50 could not be loaded as a model of timm: its config.json names no architecture of timm; "
    assert said in text
    assert "transformers, use torch-flowprune prune-checkpoint DIR, which prunes its files" in text


def test_no_command_shows_help_with_an_example(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    assert "torch-flowprune prune resnet18 --sparsity 0.5 --out pruned.safetensors" in text
    assert all(command in text for command in COMMANDS)


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_an_interrupt_is_one_line_and_130(pictures, tmp_path):
    for name in ("cats", "dogs"):
        (tmp_path / name).mkdir()
        for number in range(500):
            (tmp_path / name / f"{number}.png").symlink_to(pictures / name / "0.png")
    words = [
        "prune",
        *MODEL,
        "--sparsity",
        "0.5",
        "--method",
        "fisher_sample",
        "--rounds",
        "50",
        "--data",
        str(tmp_path),
    ]
    code = (
        "import signal, sys, timm; from torch_flowprune.cli import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it\n"
        f"print('now', flush=True); sys.exit(main({words!r}))"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        try:
            assert process.stdout.readline() == "now\n"
            time.sleep(2)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()  # one that did not hear it would work on for minutes beside the other tests
    assert process.returncode == 130, err
    said = [
        line
        for line in err.splitlines()
        if not line.startswith("UserWarning: the batch norms of this model have seen no batch")
    ]
    assert said == ["torch-flowprune prune: interrupted"]


def test_bars_are_for_terminals(run, pictures):
    pytest.importorskip("sklearn")
    text = run(
        "demo", "--out", pictures.parent / "d.png", "--methods", "magnitude", "--sparsities", "0.5", "--epochs", 1
    )
    assert "it/s" not in text


def test_traceback_on_request():
    with pytest.raises(ValueError, match="timm has no model"):
        main(["score", "resnet81", "--traceback"])


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--traceback" in text
    assert f"  torch-flowprune {command}" in text.partition("examples:")[2]
    assert "['" not in text


def test_examples_of_the_help_are_commands_that_parse():
    lines = "\n".join(EXAMPLES.values()).replace("\\\n", "").splitlines()
    commands = [line.split()[1:] for line in lines if line.strip().startswith("torch-flowprune")]
    assert len(commands) > len(EXAMPLES)
    assert all(parser().parse_args(words) for words in commands)


@pytest.mark.parametrize(
    ("text", "spelled"),
    [
        ("pass cost='flops', or leave round_to= out", "pass --cost flops, or leave --round-to out"),
        ("max_sparsity=0.8; rounds=3.", "--max-sparsity 0.8; --rounds 3."),
        ("(cost= may ask)", "(--cost may ask)"),
        ("example_inputs= is missing", "example_inputs= is missing"),
        ("fp.prune(model, cost='flops')", "fp.prune(model, cost='flops')"),
        ("cost=flops stays, and so does cost=[1]", "cost=flops stays, and so does cost=[1]"),
    ],
)
def test_keywords_are_spelled_as_options(text, spelled):
    assert as_options(text, {"cost", "round_to", "max_sparsity", "rounds"}) == spelled


def test_run_as_a_module():
    found = subprocess.run(
        [sys.executable, "-m", "torch_flowprune", "--version"], capture_output=True, text=True, check=True
    )
    assert found.stdout == f"torch-flowprune {fp.__version__}\n"

"""What each measure does to a trained net on real pictures: CIFAR-10, pruned by every measure, before any fine-tuning.

    python -m benchmarks.accuracy.cifar10 --data DIR [--images 10000] [--epochs 10] [--seeds 3]
        [--out FILE.json] [--docs docs/results/cifar10.md]

DIR holds ``train/<class>/*`` and ``test/<class>/*``, as torchvision's ImageFolder reads them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

import torch_flowprune as fp
from benchmarks.common.measure import environment
from benchmarks.common.page import shown, table, wrapped
from benchmarks.common.record import RESULTS
from torch_flowprune.cli.demo import accuracy, fit, network

COMMAND = "python -m benchmarks.accuracy.cifar10"
SPARSITIES = {"weight": (0.05, 0.5, 0.75, 0.9), "filter": (0.3, 0.5)}
BATCH = 128
MIN_KEEP = 1
"""A filter of every layer stays: an empty layer makes every accuracy 10 %, whatever the measure."""

Batches = list[tuple[Tensor, Tensor]]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog=COMMAND, description="Prune a net trained on CIFAR-10 by every measure.")
    parser.add_argument("--data", type=Path, required=True, help="holds train/<class>/* and test/<class>/*")
    parser.add_argument("--images", type=int, default=10_000, help="training images, the same number of each class")
    parser.add_argument("--test-images", type=int, default=5_000, help="test images, the same number of each class")
    parser.add_argument(
        "--score-images",
        type=int,
        default=1_000,
        help="of the training images: what scores, losses and gradients are taken over",
    )
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "accuracy" / "cifar10.json")
    parser.add_argument("--docs", type=Path, help="write the page with the tables there")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    started = time.perf_counter()
    nets, rows = [], []
    for seed in range(options.seeds):
        net, pruned = run(options, seed)
        nets.append(net)
        rows.extend(pruned)
    settings = {
        name: getattr(options, name) for name in ("images", "test_images", "score_images", "epochs", "seeds", "threads")
    }
    found = {
        "settings": settings,
        "environment": environment(),
        "seconds": round(time.perf_counter() - started),
        "dense": nets,
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = page(found)
    if options.docs:
        options.docs.write_text(text, encoding="utf-8")
    print(text)
    return found


# ------------------------------------------------------------------------------------------------- one seed


def run(options: argparse.Namespace, seed: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Train, score once a granularity, prune by every measure to every sparsity."""
    torch.manual_seed(seed)
    train, test = (
        pictures(options.data / "train", options.images, seed),
        pictures(options.data / "test", options.test_images, seed),
    )
    mean, deviation = moments(train)
    train, test = batches(train, mean, deviation, seed), batches(test, mean, deviation, seed)
    scored = train[: -(-options.score_images // BATCH)]
    model = colour_network()
    theta0 = {name: value.clone() for name, value in model.state_dict().items()}
    fit(model, train, options.epochs, learning_rate=0.05, seed=seed)
    before = fp.flow(model, scored, needs=("g", "Hg"), max_samples=options.score_images, progress=False)
    dense = {
        "seed": seed,
        "accuracy": accuracy(model, test),
        "loss": before.loss,
        "norm": squared_norm(before.g.values()),
    }
    rows = []
    for granularity, sparsities in SPARSITIES.items():
        found = fp.scores(
            model, list(fp.MEASURES), scored, granularity=granularity, theta0=theta0, max_samples=options.score_images,
            generator=torch.Generator().manual_seed(seed), progress=False,
        )  # fmt: skip
        cases = [(method, sparsity) for method in found for sparsity in sparsities]
        for method, sparsity in tqdm(cases, desc=f"seed {seed}, {granularity}s", leave=False):
            pruned = deepcopy(model)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", fp.TiedScoresWarning)
                fp.global_prune(
                    pruned,
                    scores=found[method],
                    sparsity=sparsity,
                    granularity=granularity,
                    min_keep=MIN_KEEP,
                    normalize=None,
                )
            case = {"seed": seed, "method": method, "granularity": granularity, "sparsity": sparsity}
            rows.append(
                {**case, **effect(pruned, before, scored, options.score_images), "accuracy": accuracy(pruned, test)}
            )
    return dense, rows


def effect(pruned: nn.Module, before: fp.Flow, scored: Batches, count: int) -> dict[str, float]:
    """The loss and ‖g‖² after pruning, and how both changed, as the first order predicts it and in fact."""
    after = fp.flow(pruned, scored, needs=("g",), max_samples=count, progress=False)
    removed = {name: before.theta[name] - after.theta[name] for name in before.theta}
    norm, norm_before = squared_norm(after.g.values()), squared_norm(before.g.values())
    return {
        "loss": after.loss,
        "norm": norm,
        "loss change": after.loss - before.loss,
        "loss change predicted": -sum((removed[name] * before.g[name]).sum().item() for name in removed),
        "norm change": norm - norm_before,
        "norm change predicted": -2 * sum((removed[name] * before.Hg[name]).sum().item() for name in removed),
    }


def squared_norm(gradients: Iterable[Tensor]) -> float:
    return sum(g.double().square().sum().item() for g in gradients)


def colour_network() -> nn.Sequential:
    """The demo's net, with three input channels."""
    model = network()
    first = model[0]
    model[0] = nn.Conv2d(3, first.out_channels, first.kernel_size, padding=first.padding, bias=False)
    return model


def pictures(directory: Path, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """So many images, the same number of each class, drawn by the seed."""
    folder = ImageFolder(str(directory), transform=pil_to_tensor)
    chosen = fp.class_balanced(folder, count // len(folder.classes), generator=torch.Generator().manual_seed(seed))
    images, labels = zip(*tqdm(chosen, desc=f"reading {directory.name}", leave=False), strict=True)
    return torch.stack(images).float() / 255, torch.tensor(labels)


def moments(data: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each colour."""
    return data[0].mean((0, 2, 3), keepdim=True), data[0].std((0, 2, 3), keepdim=True)


def batches(data: tuple[Tensor, Tensor], mean: Tensor, deviation: Tensor, seed: int) -> Batches:
    """Normalised, shuffled, in batches."""
    order = torch.randperm(len(data[1]), generator=torch.Generator().manual_seed(seed))
    images, labels = ((data[0] - mean) / deviation)[order], data[1][order]
    return list(zip(images.split(BATCH), labels.split(BATCH), strict=True))


# ------------------------------------------------------------------------------------------------- the page


def page(found: dict[str, Any]) -> str:
    settings, machine, dense = found["settings"], found["environment"], found["dense"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    cases = [(granularity, sparsity) for granularity, sparsities in SPARSITIES.items() for sparsity in sparsities]
    header = ["measure", *(f"{granularity}s {sparsity:.0%}" for granularity, sparsity in cases)]

    run = [method for method in fp.MEASURES if any(row["method"] == method for row in found["rows"])]

    def by_measure(cell: Any) -> str:
        return "\n".join(table(header, [[f"`{method}`", *(cell(method, *case) for case in cases)] for method in run]))

    def values(key: str, method: str, granularity: str, sparsity: float) -> list[float]:
        return [
            row[key]
            for row in found["rows"]
            if (row["method"], row["granularity"], row["sparsity"]) == (method, granularity, sparsity)
        ]

    def average(key: str, *case: Any) -> str:
        return f"{statistics.mean(values(key, *case)):.3g}"

    def percent(*case: Any) -> str:
        return _percent(values("accuracy", *case))

    def against(key: str) -> Any:
        return lambda *case: (
            f"{statistics.mean(values(f'{key} predicted', *case)):+.2g} / {statistics.mean(values(key, *case)):+.2g}"
        )

    options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings.items())
    text = _PAGE.format(
        command=shown(f"{COMMAND} --data DIR {options} --docs docs/results/cifar10.md"),
        **settings,
        processor=machine["processor"],
        cores=machine["cores"],
        memory=machine["memory_gib"],
        versions=versions,
        commit=machine["commit"],
        seconds=found["seconds"],
        dense=_percent([net["accuracy"] for net in dense]),
        dense_loss=f"{statistics.mean(net['loss'] for net in dense):.3g}",
        dense_norm=f"{statistics.mean(net['norm'] for net in dense):.3g}",
        weights=sum(p.numel() for p in colour_network().parameters()),
        accuracies=by_measure(percent),
        losses=by_measure(lambda *case: average("loss", *case)),
        norms=by_measure(lambda *case: average("norm", *case)),
        loss_changes=by_measure(against("loss change")),
        norm_changes=by_measure(against("norm change")),
    )
    return wrapped(text)


def _percent(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1%}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1%}{spread}".replace("% ±", " ±")


_PAGE = """# CIFAR-10

The demo's network (three convolutions with batch norm and a linear layer, {weights:,} parameters) was trained for
{epochs} epochs on {images:,} images of CIFAR-10, then pruned in one step by every measure, without fine-tuning. Scores,
losses and ‖g‖² are computed on {score_images:,} of the training images in eval mode, accuracies on {test_images:,} test
images. The tables show means over {seeds} seeds, ± one standard deviation. With filters, every layer keeps at least one
(`min_keep={min_keep}`).

The images are CIFAR-10's, compressed as JPEG files, which is lossy: accuracies may differ a little from those on the
original arrays.

{command}

{processor}, {cores} cores, {memory} GiB, {threads} thread(s); {versions}; commit {commit}; {seconds} s in all.

The dense network: accuracy {dense}, loss {dense_loss}, ‖g‖² {dense_norm}.

The network is trained briefly and at one learning rate. Without fine-tuning, most measures are near chance (10 %) from
weights 90 % or filters 30 % on, and differences between them mean little there. All scores are computed at temperature
1; `gradient_norm_increase` is GraSP only at 200.

## Accuracy

{accuracies}

## Loss

{losses}

## ‖g‖²

{norms}

## Change of the loss: predicted / actual

Predicted to first order, −Σ θ·g over the pruned weights. At weights 5 %, the prediction has the right size if the
pruned weights are small (magnitude, synflow), but not for loss preservation or random. For larger sparsities it says
little, because the curvature decides.

{loss_changes}

## Change of ‖g‖²: predicted / actual

Predicted to first order, −2 Σ θ·Hg over the pruned weights.

{norm_changes}
""".replace("{min_keep}", str(MIN_KEEP))


if __name__ == "__main__":
    main()

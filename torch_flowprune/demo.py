"""The demo: a small convolutional net on scikit-learn's digits, pruned by every measure at several sparsities."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

import torch_flowprune as fp

Batches: TypeAlias = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Settings:
    """What the demo runs."""

    seed: int = 0
    out: Path = Path("flowprune_demo.png")
    granularity: str = "weight"
    sparsities: Sequence[float] = (0.1, 0.5, 0.8)
    methods: Sequence[str] = tuple(fp.MEASURES)
    epochs: int = 5
    tuning_epochs: int = 2


@dataclass(frozen=True)
class Row:
    """One model: pruned by one measure to one sparsity, before and after a short fine-tune."""

    method: str
    sparsity: float
    predicted: float
    actual: float
    loss: float
    norm: float
    accuracy: float
    tuned_accuracy: float
    emptied: bool = False


def run(settings: Settings) -> list[Row]:
    """Train, score once, prune many times, print the table, write the picture."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a net only waits for a second one; and one thread gives one result on every machine
    try:
        return _run(settings)
    finally:
        torch.set_num_threads(threads)


def _run(settings: Settings) -> list[Row]:
    started = time.perf_counter()
    torch.manual_seed(settings.seed)
    train, test = digits(settings.seed)
    model = network()
    theta0 = {name: value.clone() for name, value in model.state_dict().items()}
    fit(model, train, settings.epochs, learning_rate=0.1, seed=settings.seed)
    before = fp.flow(model, train, needs=("g",), progress=False)
    print(_opening(settings, model, before, accuracy(model, test), time.perf_counter() - started))
    scores = fp.scores(model, list(settings.methods), train, granularity=settings.granularity, theta0=theta0, progress=False)
    cases = [(method, sparsity) for method in settings.methods for sparsity in settings.sparsities]
    rows = [_row(model, scores[method], sparsity, before, train, test, settings) for method, sparsity in tqdm(cases, desc="prune", leave=False)]
    print(table(rows))
    draw(rows, before, settings)
    print(f"\n{settings.out} written; {time.perf_counter() - started:.0f} s in all")
    return rows


def _row(model: nn.Module, scores: fp.Scores, sparsity: float, before: fp.Flow, train: Batches, test: Batches, settings: Settings) -> Row:
    pruned = deepcopy(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", fp.LayerCollapseWarning)
        warnings.simplefilter("ignore", fp.TiedScoresWarning)
        report = fp.global_prune(pruned, scores=scores, sparsity=sparsity, progress=False)
    after = fp.flow(pruned, train, needs=("g",), progress=False)
    assert before.g is not None and after.g is not None and before.loss is not None and after.loss is not None
    predicted = sum(((after.theta[name] - before.theta[name]) * g).sum().item() for name, g in before.g.items())
    untuned = accuracy(pruned, test)
    fit(pruned, train, settings.tuning_epochs, learning_rate=0.02, seed=settings.seed)
    emptied = any(issubclass(entry.category, fp.LayerCollapseWarning) for entry in caught)
    norm = squared_norm(after.g.values())
    return Row(report.method, sparsity, predicted, after.loss - before.loss, after.loss, norm, untuned, accuracy(pruned, test), emptied)


def digits(seed: int, batch: int = 128, held_out: int = 360) -> tuple[Batches, Batches]:
    """scikit-learn's digits (1,797 pictures of 8x8, part of that package) as batches to train and to test on."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the demo needs scikit-learn, for its digits: pip install 'torch-flowprune[demo]'") from error
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    pictures = torch.as_tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8)[order] / 16
    classes = torch.as_tensor(labels, dtype=torch.long)[order]
    train = zip(pictures[held_out:].split(batch), classes[held_out:].split(batch), strict=True)
    test = zip(pictures[:held_out].split(batch), classes[:held_out].split(batch), strict=True)
    return list(train), list(test)


def network(widths: Sequence[int] = (16, 32, 32), classes: int = 10) -> nn.Sequential:
    """Three convolutions with batch norm and a linear layer."""
    layers: list[nn.Module] = []
    for inputs, outputs in zip((1, *widths), widths, strict=False):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    layers.insert(6, nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes))


def fit(model: nn.Module, batches: Batches, epochs: int, learning_rate: float, seed: int) -> None:
    """SGD with momentum, the batches in an order that the seed fixes."""
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(batches), generator=generator).tolist():
            inputs, target = batches[index]
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs), target).backward()
            optimizer.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, batches: Batches) -> float:
    """The share of pictures named right, in eval mode."""
    model.eval()
    right = sum(int((model(inputs).argmax(-1) == target).sum()) for inputs, target in batches)
    return right / sum(len(target) for _, target in batches)


def squared_norm(gradients: Iterable[Tensor]) -> float:
    """‖g‖² over all parameters."""
    return sum(g.double().square().sum().item() for g in gradients)


def _opening(settings: Settings, model: nn.Module, before: fp.Flow, right: float, seconds: float) -> str:
    assert before.g is not None
    weights = sum(parameter.numel() for parameter in model.parameters())
    return "\n".join(
        (
            f"A convolutional net with batch norm ({weights:,} parameters), trained on scikit-learn's digits for {settings.epochs} epochs in {seconds:.1f} s.",
            f"Dense: test accuracy {right:.1%}, training loss {before.loss:.4g}, ‖g‖² {squared_norm(before.g.values()):.3g}.",
            f"Now every measure, from one flow; granularity {settings.granularity}. After pruning, before any training:",
            "  predicted  what the first order says the loss changes by, -Σ θ·g over what goes; it is exact for small changes only",
            "  actual     what it changes by; loss and ‖g‖² are over the training pictures, accuracies over 360 others",
            f"  tuned      the accuracy after {settings.tuning_epochs} more epochs, the zeros held at zero",
            "",
        )
    )


def table(rows: Sequence[Row]) -> str:
    """One line a model."""
    lines = [f"{'measure':34} {'sparsity':>8} {'predicted':>10} {'actual':>10} {'loss':>8} {'‖g‖²':>9} {'accuracy':>8} {'tuned':>7}"]
    for row in rows:
        cells = f"{row.predicted:>+10.3g} {row.actual:>+10.3g} {row.loss:>8.3g} {row.norm:>9.3g} {row.accuracy:>8.1%} {row.tuned_accuracy:>7.1%}"
        lines.append(f"{row.method:34} {row.sparsity:>8.0%} {cells}" + ("  a layer is empty" if row.emptied else ""))
    return "\n".join(lines)


def draw(rows: Sequence[Row], before: fp.Flow, settings: Settings) -> None:
    """Accuracy by sparsity before and after the fine-tune, and the predicted against the actual change of the loss."""
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the picture needs matplotlib: pip install 'torch-flowprune[demo]'") from error
    figure = Figure(figsize=(15, 5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    methods = list(dict.fromkeys(row.method for row in rows))
    for index, method in enumerate(methods):
        own = [row for row in rows if row.method == method]
        style: dict[str, Any] = {"color": colormaps["tab20"](index % 20), "marker": "os^v"[index % 4], "markersize": 5, "label": method}
        sparsities = [row.sparsity for row in own]
        left.plot(sparsities, [row.accuracy for row in own], **style)
        middle.plot(sparsities, [row.tuned_accuracy for row in own], **style)
        right.plot([row.predicted for row in own], [row.actual for row in own], linestyle="", **style)
    left.set(title="pruned", xlabel="sparsity", ylabel="test accuracy", ylim=(0, 1.02))
    middle.set(title=f"pruned, {settings.tuning_epochs} epochs later", xlabel="sparsity", ylim=(0, 1.02))
    right.set(title="change of the training loss", xlabel="predicted by the first order", ylabel="actual", xscale="symlog", yscale="symlog")
    threshold = max(1e-3, abs(before.loss or 0.0))
    right.set_xscale("symlog", linthresh=threshold)
    right.set_yscale("symlog", linthresh=threshold)
    right.axline((0, 0), (1, 1), color="grey", linewidth=0.8)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(settings.out, dpi=120)

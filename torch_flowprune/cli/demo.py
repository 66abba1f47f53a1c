"""The demo: a small convolutional net on scikit-learn's digits, pruned by every measure at several sparsities."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

import torch_flowprune as fp
from torch_flowprune.cli.output_files import tell

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


class Point(NamedTuple):
    """A model as the training pictures see it: its weights, its gradient, its loss."""

    theta: dict[str, Tensor]
    g: dict[str, Tensor]
    loss: float

    @property
    def norm(self) -> float:
        """‖g‖² over all parameters."""
        return sum(g.double().square().sum().item() for g in self.g.values())


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
    tuned: float
    emptied: bool = False


def run(settings: Settings) -> list[Row]:
    """Train, score once, prune many times, print the table, write the picture."""
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # so small a net only waits for a second one; and one thread gives one result on every machine
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
    dense = point(model, train)
    tell(_opening(settings, model, dense, accuracy(model, test), time.perf_counter() - started))
    scores = fp.scores(
        model, list(settings.methods), train, granularity=settings.granularity, theta0=theta0, progress=False
    )
    cases = [(method, sparsity) for method in settings.methods for sparsity in settings.sparsities]
    rows = []
    for method, sparsity in tqdm(cases, desc="prune", leave=False, disable=None):
        pruned, report, emptied = _pruned_copy(model, scores[method], sparsity)
        after, untuned = point(pruned, train), accuracy(pruned, test)
        changes = {
            "predicted": first_order(dense, after),
            "actual": after.loss - dense.loss,
        }  # now: training moves the weights that a flow holds
        fit(pruned, train, settings.tuning_epochs, learning_rate=0.02, seed=settings.seed)
        tuned = accuracy(pruned, test)
        rows.append(
            Row(
                report.method,
                sparsity,
                **changes,
                loss=after.loss,
                norm=after.norm,
                accuracy=untuned,
                tuned=tuned,
                emptied=emptied,
            )
        )
    draw(rows, dense.loss, settings)
    tell(table(rows))
    tell(f"\n{settings.out} written; {time.perf_counter() - started:.0f} s in all")
    return rows


def _pruned_copy(model: nn.Module, scores: fp.Scores, sparsity: float) -> tuple[nn.Module, fp.Report, bool]:
    """A pruned copy, and whether one of its layers is empty: the table says so, in place of the warning."""
    pruned = deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fp.LayerCollapseWarning)
        warnings.simplefilter("ignore", fp.TiedScoresWarning)
        report = fp.global_prune(pruned, scores=scores, sparsity=sparsity, min_keep=0, progress=False)
    return pruned, report, any(layer.pruned == layer.units for layer in report.layers)


def point(model: nn.Module, data: Batches) -> Point:
    """θ, g and the loss over all of the data."""
    here = fp.flow(model, data, needs=("g",), progress=False)
    return Point(here.theta, cast("dict[str, Tensor]", here.g), cast("float", here.loss))


def first_order(before: Point, after: Point) -> float:
    """The change of the loss as the gradient has it: Σ (θ_after − θ_before)·g, which is −Σ θ·g over what went."""
    return sum(((after.theta[name] - theta) * before.g[name]).sum().item() for name, theta in before.theta.items())


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


def _epochs(number: int, more: str = "") -> str:
    return f"{number} {more}epoch{'' if number == 1 else 's'}"


def _opening(settings: Settings, model: nn.Module, dense: Point, right: float, seconds: float) -> str:
    weights = sum(parameter.numel() for parameter in model.parameters())
    net = f"A convolutional net with batch norm, {weights:,} parameters"
    return f"""\
{net}, trained on scikit-learn's digits for {_epochs(settings.epochs)} in {seconds:.1f} s.
Dense: test accuracy {right:.1%}, training loss {dense.loss:.4g}, ‖g‖² {dense.norm:.3g}.
Now every measure, from one flow; granularity: {settings.granularity}. After pruning, before any training:
  predicted  the change of the loss to first order, -Σ θ·g over the pruned weights: exact for small changes only
  actual     the change of the loss; loss and ‖g‖² are over the training images, accuracy is over 360 others
  tuned      the accuracy after {_epochs(settings.tuning_epochs, "more ")} of training, the zeros held at zero
"""


def table(rows: Sequence[Row]) -> str:
    """One line a model."""
    lines = [
        (
            f"{'measure':34} {'sparsity':>8} {'predicted':>10} {'actual':>10} {'loss':>8} {'‖g‖²':>9} {'accuracy':>8} "
            f"{'tuned':>7}"
        )
    ]
    for row in rows:
        cells = (
            f"{row.predicted:>+10.3g} {row.actual:>+10.3g} {row.loss:>8.3g} {row.norm:>9.3g} {row.accuracy:>8.1%} "
            f"{row.tuned:>7.1%}"
        )
        lines.append(f"{row.method:34} {row.sparsity:>8.0%} {cells}" + ("  a layer is empty" if row.emptied else ""))
    return "\n".join(lines)


def draw(rows: Sequence[Row], loss: float, settings: Settings) -> None:
    """Accuracy by sparsity before and after the fine-tune, and the predicted against the actual change of the loss."""
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the figure needs matplotlib: pip install 'torch-flowprune[demo]'") from error
    figure = Figure(figsize=(15, 5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    methods = list(dict.fromkeys(row.method for row in rows))
    for index, method in enumerate(methods):
        own = [row for row in rows if row.method == method]
        style: dict[str, Any] = {
            "color": colormaps["tab20"](index % 20),
            "marker": "os^v"[index % 4],
            "markersize": 5,
            "label": method,
        }
        sparsities = [row.sparsity for row in own]
        left.plot(sparsities, [row.accuracy for row in own], **style)
        middle.plot(sparsities, [row.tuned for row in own], **style)
        right.plot([row.predicted for row in own], [row.actual for row in own], linestyle="", **style)
    left.set(title="pruned", xlabel="sparsity", ylabel="test accuracy", ylim=(0, 1.02))
    middle.set(title=f"pruned, {settings.tuning_epochs} epochs later", xlabel="sparsity", ylim=(0, 1.02))
    right.set(title="change of the training loss", xlabel="predicted by the first order", ylabel="actual")
    right.set_xscale("symlog", linthresh=loss)
    right.set_yscale("symlog", linthresh=loss)
    right.axline((0, 0), (1, 1), color="grey", linewidth=0.8)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(settings.out, dpi=120)

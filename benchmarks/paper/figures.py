"""One figure a claim, from the results."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from benchmarks.paper.rows import SHORT, Row, age, chosen, epochs_of, loss_change, methods_of, norm_ratio, rows_of


def figure(found: Row, folder: Path) -> Path | None:
    """Drawn into the page's folder, or None for an experiment that has none."""
    if found["experiment"] not in FIGURES:
        return None
    path = folder / name_of(found)
    path.parent.mkdir(parents=True, exist_ok=True)
    FIGURES[found["experiment"]](found).savefig(path, dpi=90)
    return path


def name_of(found: Row) -> str:
    """As the page links it."""
    return f"figures/paper_{found['experiment']}_{found['name']}.png"


def _panels(count: int, height: float = 3.4) -> tuple[Figure, Any]:
    made = Figure(figsize=(3.1 * count + 2.2, height), layout="constrained")
    return made, made.subplots(1, count, squeeze=False)[0]


def _legend(made: Figure, axes: Any) -> Figure:
    made.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    return made


def _colours(methods: list[str]) -> dict[str, Any]:
    return dict(zip(methods, colormaps["tab20"].colors, strict=False))  # type: ignore[attr-defined]


def _by_age(found: Row, draw: Callable[[Any, list[Row]], None], **where: Any) -> Figure:
    rows = chosen(rows_of(found), **where)
    epochs = epochs_of(rows)
    made, places = _panels(len(epochs))
    for axes, epoch in zip(places, epochs, strict=True):
        draw(axes, [row for row in rows if row["epoch"] == epoch])
        axes.set_title(f"after {age(epoch)}", fontsize=9)
    return _legend(made, places[0])


def _expansions(found: Row) -> Figure:
    """Above, predicted against actual ΔL.

    Below, ΔL and the change of ‖g‖² of every measure, at the smallest cut of filters.
    """
    rows = [row for row in rows_of(found) if row["granularity"] == "filter"]
    epochs, low = epochs_of(rows), min(found["setting"]["sparsities"])
    made = Figure(figsize=(3.1 * len(epochs) + 2.2, 6.4), layout="constrained")
    places = made.subplots(2, len(epochs), squeeze=False)
    colours = _colours(methods_of(rows))
    for column, epoch in enumerate(epochs):
        above, below = places[:, column]
        for method, colour in colours.items():
            own = chosen(rows, method=method, epoch=epoch)
            above.plot(
                [r["predicted_loss"] for r in own],
                [loss_change(r) for r in own],
                ".",
                label=SHORT.get(method, method),
                ms=5,
                color=colour,
            )
            cut = [row for row in own if row["sparsity"] == low]
            below.plot([norm_ratio(r) for r in cut], [loss_change(r) for r in cut], "o", ms=4, color=colour)
        above.axline((0, 0), slope=1, color="grey", linewidth=0.6)
        above.set_xscale("symlog", linthresh=0.1)
        above.set_yscale("symlog", linthresh=0.1)
        above.set(xlabel="ΔL to first order", ylabel="ΔL", title=f"after {age(epoch)}")
        below.axvline(0, color="grey", linewidth=0.6)
        below.set_yscale("symlog", linthresh=0.1)
        below.set(xlabel=f"‖g‖², power of ten, {low:.0%} gone", ylabel="ΔL")
    return _legend(made, places[0, 0])


def _convergence(found: Row) -> Figure:
    def draw(axes: Any, rows: list[Row]) -> None:
        for method in methods_of(rows):
            curves = [[loss for loss, _ in row["validation"]] for row in rows if row["method"] == method]
            axes.plot(
                [statistics.mean(step) for step in zip(*curves, strict=True)],
                label=SHORT.get(method, method),
                linewidth=1,
            )
        axes.set(xlabel="epochs after pruning", ylabel="validation loss", yscale="log")

    return _by_age(found, draw)


def _trajectories(found: Row) -> Figure:
    """‖θ(t)‖² − ‖θ(0)‖² in training, of one seed, after the larger cut."""

    def draw(axes: Any, rows: list[Row]) -> None:
        first = min(row["seed"] for row in rows)
        for row in rows:
            if row["seed"] == first and row["sparsity"] in (0, max(found["setting"]["sparsities"])):
                style = {"color": "black", "linewidth": 2} if row["method"] == "none" else {"linewidth": 1}
                moved = [norm - row["norms"][0] for norm in row["norms"]]
                axes.plot(
                    [i / (len(moved) - 1) for i in range(len(moved))],
                    moved,
                    label=SHORT.get(row["method"], row["method"]),
                    **style,
                )
        axes.set(xlabel="share of two epochs", ylabel="‖θ(t)‖² − ‖θ(0)‖²")

    return _by_age(found, draw, kind="training")


def _protocol(found: Row) -> Figure:
    """The accuracy over the rounds, and the median ‖θ‖² and validation loss over the epochs of the longest schedule."""
    rows = rows_of(found)
    rounds = sorted({row["rounds"] for row in rows} - {0})
    made, (left, middle, right) = _panels(3)
    for method, colour in _colours(methods_of(rows)).items():
        style = {"color": "black", "linestyle": ":"} if method == "none" else {"color": colour}
        runs = [chosen(rows, method=method, rounds=0 if method == "none" else n) for n in rounds]
        accuracies = [
            statistics.mean(100 * run["test"]["accuracy"] for run in some) if some else math.nan for some in runs
        ]
        left.plot(range(len(rounds)), accuracies, marker=".", label=SHORT.get(method, method), **style)
        for axes, curve in ((middle, "validation_loss"), (right, "theta_norm")):
            axes.plot(
                [_median(step) for step in zip(*(row["curves"][curve] for row in runs[-1]), strict=True)],
                linewidth=1,
                **style,
            )
    left.set_xticks(range(len(rounds)), [str(n) for n in rounds])
    left.set(xlabel="rounds", ylabel="test accuracy, %")
    middle.set(yscale="log", xlabel=f"epoch, {rounds[-1]} rounds", ylabel="validation loss (T of training)")
    right.set(yscale="log", xlabel=f"epoch, {rounds[-1]} rounds", ylabel="‖θ‖²")
    for axes in (middle, right):
        drawn = [value for line in axes.lines for value in line.get_ydata() if math.isfinite(value)]
        first, *_, last = axes.lines[0].get_ydata()
        axes.set_ylim(
            0.95 * min(drawn), min(1.05 * max(drawn), 1.3 * max(first, last))
        )  # what breaks down leaves the picture
    return _legend(made, left)


def _median(values: tuple[float | None, ...]) -> float:
    """Of the numbers among them."""
    numbers = [value for value in values if value is not None]
    return statistics.median(numbers) if numbers else math.nan


def _initialisation(found: Row) -> Figure:
    """‖g‖² after the cut over the sparsity, by kind of unit; and the accuracy after training."""
    rows = [row for row in rows_of(found) if row["method"] != "none"]
    kinds = list(dict.fromkeys(row["granularity"] for row in rows))
    made, (*places, last) = _panels(len(kinds) + 1)
    for method, colour in _colours(methods_of(rows)).items():
        for axes, kind in zip(places, kinds, strict=True):
            own = chosen(rows, granularity=kind, method=method)
            sparsities = sorted({row["sparsity"] for row in own})
            ratios = [[row["norm_ratio"] for row in own if row["sparsity"] == sparsity] for sparsity in sparsities]
            means = [statistics.mean(-16 if ratio is None else max(ratio, -16) for ratio in some) for some in ratios]
            axes.plot(range(len(means)), means, marker=".", color=colour, label=SHORT.get(method, method))
            axes.set_xticks(range(len(means)), [f"{sparsity:.0%}" for sparsity in sparsities])
            axes.set(title=f"{kind}s", xlabel="gone", ylabel="‖g‖², power of ten")
        trained = [
            statistics.mean(
                100 * row["trained"]["accuracy"]
                for row in chosen(rows, granularity=kind, method=method)
                if "trained" in row
            )
            for kind in kinds
        ]
        last.plot(kinds, trained, "o", color=colour)
    last.set(ylabel="test accuracy after training, %", title=found["setting"]["model"])
    return _legend(made, places[0])


FIGURES: dict[str, Callable[[Row], Figure]] = {
    "expansions": _expansions,
    "convergence": _convergence,
    "trajectories": _trajectories,
    "protocol": _protocol,
    "initialisation": _initialisation,
}

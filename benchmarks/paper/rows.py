"""Rows of an experiment's file, grouped by what was varied.

Values of a row, and how they are written over the seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from typing import Any

Row = dict[str, Any]
Value = Callable[[Row], float]
SHORT = {
    "magnitude, by mean": "magnitude, over its layer's mean",
    "gradient_norm_increase T=1": "increase, T=1", "gradient_norm_increase T=200": "increase, T=200",
    "gradient_norm_preservation T=1": "preservation, T=1", "gradient_norm_preservation T=200": "preservation, T=200",
    "gradient_norm_increase": "increase, T=200", "gradient_norm_preservation": "preservation, T=1", "none": "unpruned",
}  # fmt: skip
ORDER = (
    "none",
    "magnitude",
    "magnitude, by mean",
    "l1",
    "loss_preservation",
    "taylor",
    "biased_loss_preservation",
    "distance_biased_loss_preservation",
    "fisher",
    "fisher_sample",
    "synflow",
    "synflow, 20 rounds",
    "random",
    "gradient_norm_increase",
    "gradient_norm_preservation",
)
TITLES = {"folder": "CIFAR-10 (JPEG copy)", "cifar10": "CIFAR-10 (JPEG copy)"}


# ------------------------------------------------------------------------------------------------- grouping


def rows_of(found: Row) -> list[Row]:
    """Every row with its seed, and the epochs of training before pruning where the part's name holds them.

    Not of runs that broke down.
    """
    listed = []
    for key, rows in found["parts"].items():
        seed, *names = key.split("/")
        epoch = next((int(name) for name in names if name.isdigit()), None)
        listed += [{**row, "seed": int(seed), "epoch": epoch} for row in rows if "failed" not in row]
    return listed


def chosen(rows: Iterable[Row], **where: Any) -> list[Row]:
    """The rows where all of it holds, in the order of the seeds."""
    return sorted(
        (row for row in rows if all(row.get(key) == wanted for key, wanted in where.items())),
        key=lambda row: row["seed"],
    )


def over_seeds(rows: Iterable[Row], value: Value, **where: Any) -> list[float]:
    """One value a seed."""
    return [value(row) for row in chosen(rows, **where)]


def paired(rows: list[Row], value: Value, one: Row, other: Row) -> dict[int, float]:
    """By seed, the value where ``one`` holds less that where ``other`` does; of the seeds that have both."""
    return matched(*({row["seed"]: value(row) for row in chosen(rows, **where)} for where in (one, other)))


def matched(one: dict[int, float], other: dict[int, float]) -> dict[int, float]:
    """The differences of what two have, by seed."""
    return {seed: one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())}


def spread(values: list[float], digits: int = 3) -> str:
    """Mean ± standard deviation over the seeds."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.{digits - 1}g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}g}{deviation}"


def percent(values: list[float]) -> str:
    """The same in percent, with one decimal."""
    if not values:
        return ""
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{deviation}"


def signed(values: list[float]) -> str:
    """Differences with one decimal, their sign, and how many have that of the mean."""
    if not values:
        return ""
    mean = statistics.mean(values)
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean:+.1f}{deviation} ({sum(value * mean > 0 for value in values)} of {len(values)})".replace("-", "−")


def title(found: Row, what: str) -> list[str]:
    setting = found["setting"]
    seeds = len({key.split("/")[0] for key in found["parts"]})
    subset = f", {setting['subset']:,} images" if setting["subset"] else ""
    data = f"{TITLES.get(setting['data'], setting['data'])}{subset}, {setting['size']} x {setting['size']}"
    net = "" if setting["model"] == "several" else f"{setting['model']}, "
    return [f"**{what}.** {net}width {setting['width']:g}, {data}; {seeds} seed{'s' if seeds > 1 else ''}.", ""]


def age(epoch: int) -> str:
    return f"{epoch} epoch{'' if epoch == 1 else 's'}"


def methods_of(rows: list[Row]) -> list[str]:
    """In one order everywhere: the unpruned net, order 0, order 1, beside them, order 2."""
    return sorted({row["method"] for row in rows}, key=lambda method: (ORDER.index(method.partition(" T=")[0]), method))


def epochs_of(rows: list[Row]) -> list[int]:
    return sorted({row["epoch"] for row in rows})


# ------------------------------------------------------------------------------------------------- values


def accuracy(row: Row) -> float:
    """Of the test images, in points."""
    return float(100 * row["test"]["accuracy"])


def loss_change(row: Row) -> float:
    return float(row["after"]["loss"] - row["before"]["loss"])


def norm_ratio(row: Row) -> float:
    """log10 of ‖g‖² after over before."""
    return math.log10(max(row["after"]["gradient_norm"], 1e-30) / max(row["before"]["gradient_norm"], 1e-30))


def relative(row: Row, what: str) -> float:
    return abs(float(row["after"][what] - row["before"][what])) / abs(row["before"][what])


def mean_loss(row: Row) -> float:
    """Of the validation images, over the epochs after the cut."""
    return statistics.mean(loss for loss, _ in row["validation"][1:])


def deviation(row: Row, reference: Row) -> float:
    """How far ‖θ(t)‖² − ‖θ(0)‖² of a cut net is from that of the net before, over the mean size of the latter.

    0 if it is the same.
    """
    pairs = list(zip(row["norms"], reference["norms"], strict=False))[1:]
    moved = [(one - row["norms"][0], other - reference["norms"][0]) for one, other in pairs]
    return sum(abs(one - other) for one, other in moved) / sum(abs(other) for _, other in moved)


def deviations(rows: list[Row], **where: Any) -> dict[int, float]:
    """One a seed; ``where`` names the cut, and the net before it is the one of the same seed, age and kind."""
    shared = {key: where[key] for key in ("epoch", "kind")}
    before = {row["seed"]: row for row in chosen(rows, method="none", **shared)}
    return {row["seed"]: deviation(row, before[row["seed"]]) for row in chosen(rows, **where)}

"""Results as tables: one function an experiment."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

from benchmarks.common.page import table
from benchmarks.paper.rows import (
    SHORT,
    Row,
    Value,
    accuracy,
    age,
    chosen,
    deviations,
    epochs_of,
    loss_change,
    mean_loss,
    methods_of,
    norm_ratio,
    over_seeds,
    paired,
    percent,
    relative,
    rows_of,
    signed,
    spread,
    title,
)

_COLUMNS = 24
"""As many as a page shows side by side."""


def _expansions(found: Row) -> list[list[str]]:
    rows = rows_of(found)
    epochs, methods = epochs_of(rows), methods_of(rows)
    header = ["measure", *map(age, epochs)]

    def of(value: Value, sparsity: float, granularity: str) -> list[str]:
        where = {"sparsity": sparsity, "granularity": granularity}
        return table(
            header,
            [
                [SHORT.get(m, m), *(spread(over_seeds(rows, value, method=m, epoch=e, **where)) for e in epochs)]
                for m in methods
            ],
        )

    low = min(found["setting"]["sparsities"])
    asked: list[tuple[str, Value, float, str]] = [
        ("ΔL on the images scored, 50 % of filters pruned", loss_change, 0.5, "filter"),
        (
            "ΔL on images not seen, 50 % of filters pruned",
            lambda r: r["after"]["held_out"] - r["before"]["held_out"],
            0.5,
            "filter",
        ),
        ("‖g‖² after / before, as a power of ten, 50 % of filters pruned", norm_ratio, 0.5, "filter"),
        (f"‖g‖² after / before, as a power of ten, {low:.0%} of filters pruned", norm_ratio, low, "filter"),
        (f"ΔL, {low:.0%} of filters pruned", loss_change, low, "filter"),
        (f"ΔL predicted to first order, {low:.0%} of filters pruned", lambda r: r["predicted_loss"], low, "filter"),
        (
            f"ΔL predicted to second order, {low:.0%} of filters pruned",
            lambda r: r["predicted_loss"] + r["curvature"],
            low,
            "filter",
        ),
        (
            f"Change of d‖θ‖²/dt over its size, {low:.0%} of filters pruned",
            lambda r: relative(r, "rate"),
            low,
            "filter",
        ),
        (
            f"Change of d²‖θ‖²/dt² over its size, {low:.0%} of filters pruned",
            lambda r: relative(r, "acceleration"),
            low,
            "filter",
        ),
        ("ΔL, 90 % of single weights pruned", loss_change, 0.9, "weight"),
    ]
    return [[*title(found, what), *of(value, sparsity, granularity)] for what, value, sparsity, granularity in asked]


def _norms(found: Row) -> list[list[str]]:
    rows = rows_of(found)
    lines = []
    for epoch in epochs_of(rows):
        own = chosen(rows, epoch=epoch)
        off = [
            [abs(math.log10(abs(row[what]) / row["after"])) for row in own]
            for what in ("before", "first_order", "predicted")
        ]
        within = sum(abs(row["after"] - row["predicted"]) <= row["error"] for row in own)
        lines.append([age(epoch), *(f"{statistics.median(one):.2g}" for one in off), f"{within} of {len(own)}"])
    header = [
        "net after",
        "‖g‖² as it was",
        "first order, all parameters",
        "`pruned_gradient_norm`",
        "within its error bar",
    ]
    low = min(found["setting"]["sparsities"])
    what = (
        f"How far from ‖g‖² of the pruned model, in powers of ten, the median over measures and seeds; {low:.0%} of "
        "filters pruned"
    )
    return [[*title(found, what), *table(header, lines)]]


def _stability(found: Row) -> list[list[str]]:
    rows = rows_of(found)
    tables = []
    for epoch in epochs_of(rows):
        sizes = sorted({row["samples"] for row in rows})
        header = ["measure", *(f"{n} images" for n in sizes), f"same half, {sizes[-1]}", "scores that are 0"]
        lines = []
        for method in methods_of(rows):
            where = {"method": method, "epoch": epoch}
            ranks = [spread(over_seeds(rows, lambda r: r["spearman"], samples=n, **where), 2) for n in sizes]
            last = {"samples": sizes[-1], **where}
            shared, zero = (
                over_seeds(rows, lambda r: r["overlap"], **last),
                over_seeds(rows, lambda r: r["zero"], **last),
            )
            lines.append([SHORT.get(method, method), *ranks, spread(shared, 2), f"{statistics.mean(zero):.1%}"])
        tables.append(
            [*title(found, f"Spearman's correlation of the scores of two samples, {age(epoch)}"), *table(header, lines)]
        )
    return tables


def _convergence(found: Row) -> list[list[str]]:
    rows = rows_of(found)
    tables = []
    for epoch in epochs_of(rows):
        last = found["setting"]["epochs"]
        header = [
            "measure",
            "loss before training",
            "after 1 epoch",
            f"after {last} epochs",
            "mean over the epochs",
            "test accuracy, %",
        ]
        lines = []
        for method in methods_of(rows):
            where = {"method": method, "epoch": epoch}
            cells = [over_seeds(rows, lambda r, i=i: r["validation"][i][0], **where) for i in (0, 1, -1)]  # type: ignore[misc]
            cells.append(over_seeds(rows, mean_loss, **where))
            lines.append(
                [
                    SHORT.get(method, method),
                    *map(spread, cells),
                    percent(over_seeds(rows, lambda r: r["test"][1], **where)),
                ]
            )
        what = f"Validation loss, {found['setting']['goal']:.0%} of filters pruned after {age(epoch)}, then trained"
        tables.append([*title(found, what), *table(header, lines)])
    return tables


def _protocol(found: Row) -> list[list[str]]:
    rows, setting = rows_of(found), found["setting"]
    rounds = sorted({row["rounds"] for row in rows} - {0})

    seeds = len({key.split("/")[0] for key in found["parts"]})
    failed = [(row["method"], row["rounds"]) for part in found["parts"].values() for row in part if "failed" in row]

    def cell(method: str, n: int, value: Value) -> str:
        values = over_seeds(rows, value, method=method, rounds=0 if method == "none" else n)
        some = f"{len(values)} of {seeds} seeds" if 0 < len(values) < seeds else ""
        broken = f"{failed.count((method, n))} broke down" if (method, n) in failed else ""
        notes = ", ".join(filter(None, (some, broken)))
        return f"{percent(values)} ({notes})".lstrip() if notes else percent(values)

    def line(method: str, value: Value) -> list[str]:
        return [SHORT.get(method, method), *(cell(method, n, value) for n in rounds)]

    header = ["measure", *(f"{n} round{'s' if n > 1 else ''}" for n in rounds)]
    what = f"{setting['goal']:.0%} of filters pruned, {setting['epochs']} epochs, T = {setting['temperature']:g}"
    asked: list[tuple[str, Value]] = [
        ("Test accuracy, %", lambda r: accuracy(r) / 100),
        ("Multiply-adds left, %", lambda r: r["size"]["pruned"]["macs"] / r["size"]["dense"]["macs"]),
        ("Parameters left, %", lambda r: r["size"]["pruned"]["parameters"] / r["size"]["dense"]["parameters"]),
    ]
    made = [
        [*title(found, f"{name}; {what}"), *table(header, [line(m, value) for m in methods_of(rows)])]
        for name, value in asked
    ]
    left = _left(found, [row for row in rows if row["rounds"] == rounds[-1] and row.get("left")])
    return [*made, *left, *_gains(found, rows, rounds), *_guessing(found, rounds)]


def _gains(found: Row, rows: list[Row], rounds: list[int]) -> list[list[str]]:
    """In points of test accuracy, seed by seed.

    What more rounds give to a measure, and what a measure gives over random filters.
    """
    methods = [method for method in methods_of(rows) if method != "none"]

    def line(method: str) -> list[str]:
        more = [
            paired(rows, accuracy, {"method": method, "rounds": n}, {"method": method, "rounds": rounds[0]})
            for n in rounds[1:]
        ]
        over = [
            paired(rows, accuracy, {"method": method, "rounds": n}, {"method": "random", "rounds": n})
            for n in rounds
            if method != "random"
        ]
        return [
            SHORT.get(method, method),
            *(signed(list(values.values())) for values in (*more, *over)),
            *([""] * len(rounds) if method == "random" else []),
        ]

    header = [
        "measure",
        *(f"{n} rounds − {rounds[0]}" for n in rounds[1:]),
        *(f"− random, {n} round{'s' if n > 1 else ''}" for n in rounds),
    ]
    return [
        [
            *title(found, "Differences of test accuracy, in points, seed by seed"),
            *table(header, [line(method) for method in methods]),
        ]
    ]


def _guessing(found: Row, rounds: list[int]) -> list[list[str]]:
    """How many runs ended with the training loss of guessing among ten classes, or before their end, if any did."""
    runs = [row for part in found["parts"].values() for row in part if row["method"] != "none"]
    lost = [
        (run["method"], run["rounds"]) for run in runs if "failed" in run or run["train_loss"][-1] > math.log(10) - 0.01
    ]
    every = [(run["method"], run["rounds"]) for run in runs]
    header = ["measure", *(f"{n} round{'s' if n > 1 else ''}" for n in rounds)]
    lines = [
        [SHORT.get(m, m), *(f"{lost.count((m, n))} of {every.count((m, n))}" for n in rounds)] for m in methods_of(runs)
    ]
    return [[*title(found, "Runs that ended guessing, or broke down"), *table(header, lines)]] if lost else []


def _left(found: Row, rows: list[Row]) -> list[list[str]]:
    """Of each layer, how many filters the longest schedule leaves.

    Not of nets with more layers than a page has columns.
    """
    if not rows or len(rows[0]["left"]) > _COLUMNS:
        return []
    means = {
        method: [
            statistics.mean(layer) for layer in zip(*(row["left"] for row in chosen(rows, method=method)), strict=True)
        ]
        for method in methods_of(rows)
    }
    header = ["measure", *map(str, range(1, len(rows[0]["left"]) + 1))]
    lines = [[SHORT.get(method, method), *(f"{mean:.1f}" for mean in layers)] for method, layers in means.items()]
    return [[*title(found, f"Filters left in each convolution, {rows[0]['rounds']} rounds"), *table(header, lines)]]


def _trajectories(found: Row) -> list[list[str]]:
    rows = rows_of(found)
    epochs, tables = epochs_of(rows), []
    for kind, described in (("flow", "in the flow of the scored loss"), ("training", "in two epochs of training")):
        for sparsity in sorted({row["sparsity"] for row in rows} - {0}):
            own = [row for row in rows if row["kind"] == kind]
            lines = [
                [
                    SHORT.get(m, m),
                    *(
                        spread(list(deviations(rows, method=m, epoch=e, kind=kind, sparsity=sparsity).values()))
                        for e in epochs
                    ),
                ]
                for m in methods_of(own)
                if m != "none"
            ]
            what = (
                f"How far ‖θ(t)‖² − ‖θ(0)‖² is from that of the net not cut, over its size, {described}, "
                f"{sparsity:.0%} of filters pruned"
            )
            tables.append([*title(found, what), *table(["measure", *map(age, epochs)], lines)])
    return [*tables, _symmetry(found, rows)]


def _symmetry(found: Row, rows: list[Row]) -> list[str]:
    lines = []
    for epoch in epochs_of(rows):
        cells = [
            spread(over_seeds(rows, lambda r, w=what: r[w], epoch=epoch, mode=mode))
            for mode in ("eval", "train")
            for what in ("filters", "weights")
        ]  # type: ignore[misc]
        lines.append([age(epoch), *cells])
    header = [
        "net after",
        "Σ\\|θᵀg\\| over filters, eval mode",
        "Σ\\|θ·g\\| over weights, eval mode",
        "filters, train mode",
        "weights, train mode",
    ]
    return [*title(found, "θᵀg of the filters before a batch norm"), *table(header, lines)]


def _initialisation(found: Row) -> list[list[str]]:
    rows, tables = rows_of(found), []
    dense = percent([row["trained"]["accuracy"] for row in chosen(rows, method="none")])
    for granularity in dict.fromkeys(row["granularity"] for row in rows):
        own = [row for row in chosen(rows, granularity=granularity) if row["method"] != "none"]
        sparsities = sorted({row["sparsity"] for row in own})
        trained_at = next(row["sparsity"] for row in own if "trained" in row)
        lines = [_at_initialisation(own, method, sparsities) for method in methods_of(own)]
        header = [
            "measure",
            "scores that are 0",
            *(f"{sparsity:.0%}" for sparsity in sparsities),
            f"trained at {trained_at:.0%}, %",
        ]
        what = (
            f"Pruned at initialisation by {granularity}s: ΔL, in brackets how many of {own[0]['layers']} layers are "
            "empty; and the test accuracy "
            f"after {found['setting']['epochs']} epochs (unpruned {dense})"
        )
        tables.append([*title(found, what), *table(header, lines)])
    return tables


def _at_initialisation(rows: list[Row], method: str, sparsities: list[float]) -> list[str]:
    own = chosen(rows, method=method)
    zero = "" if own[0]["zero"] is None else f"{statistics.mean(row['zero'] for row in own):.1%}"
    cells = []
    for sparsity in sparsities:
        here = [row for row in own if row["sparsity"] == sparsity]
        emptied = statistics.mean(row["emptied"] for row in here)
        cells.append(spread([row["change"] for row in here], 2) + (f" ({emptied:.3g})" if emptied else ""))
    return [
        SHORT.get(method, method),
        zero,
        *cells,
        percent([row["trained"]["accuracy"] for row in own if "trained" in row]),
    ]


def _networks(found: Row) -> list[list[str]]:
    lines = []
    for row in rows_of(found):
        dense, pruned = row["size"]["dense"], row["size"]["pruned"]
        left = [f"{pruned[what]:,} of {dense[what]:,}" for what in ("parameters", "macs")]
        lines.append(
            [
                row["model"],
                *left,
                f"{row['train_loss'][0]:.3f}",
                f"{row['train_loss'][-1]:.3f}",
                percent([row["test"]["accuracy"]]),
            ]
        )
    setting, method = found["setting"], rows_of(found)[0]["method"]
    header = [
        "model",
        "parameters left",
        "multiply-adds left",
        "training loss of the first epoch",
        "of the last",
        "test accuracy, %",
    ]
    steps = setting["epochs"] * -(-setting["train"] // setting["batch"])
    return [
        [
            *title(found, f"{setting['goal']:.0%} of filters pruned by {SHORT.get(method, method)}, {steps} steps"),
            *table(header, lines),
        ]
    ]


TABLES: dict[str, Callable[[Row], list[list[str]]]] = {
    "expansions": _expansions,
    "norms": _norms,
    "stability": _stability,
    "convergence": _convergence,
    "protocol": _protocol,
    "trajectories": _trajectories,
    "initialisation": _initialisation,
    "networks": _networks,
}

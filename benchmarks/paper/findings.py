"""Results of ``benchmarks.paper.claims`` as tables and figures.

    python -m benchmarks.paper.findings benchmarks/results/paper_*.json --docs docs/paper.md

puts the tables between the marks of the page, and the figures beside it. ``PART ... --merge OUT`` makes one file of several seeds' files, or of
the ``result.json`` of several runs of ``benchmarks.paper``.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

Row = dict[str, Any]
MARKS = ("<!-- tables of python -m benchmarks.paper.findings -->", "<!-- end of tables -->")
SHORT = {
    "gradient_norm_increase T=1": "increase, T=1", "gradient_norm_increase T=200": "increase, T=200",
    "gradient_norm_preservation T=1": "preservation, T=1", "gradient_norm_preservation T=200": "preservation, T=200",
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper.findings", description="Tables and figures of the claims.")
    parser.add_argument("files", type=Path, nargs="+", help="what benchmarks.paper.claims wrote")
    parser.add_argument("--docs", type=Path, help="the page to put the tables into")
    parser.add_argument("--merge", type=Path, metavar="OUT", help="write the parts of all files into one instead")
    options = parser.parse_args(arguments)
    found = [json.loads(path.read_text(encoding="utf-8")) for path in options.files]
    if options.merge:
        options.merge.parent.mkdir(parents=True, exist_ok=True)
        options.merge.write_text(json.dumps(merged(found), separators=(",", ":")) + "\n", encoding="utf-8")
        return
    text = "\n\n".join("\n".join(table) for one in found for table in TABLES[one["experiment"]](one))
    if not options.docs:
        print(text)
        return
    page = options.docs.read_text(encoding="utf-8")
    before, _, rest = page.partition(MARKS[0])
    options.docs.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{rest.partition(MARKS[1])[2]}", encoding="utf-8")
    for one in found:
        figure(one, options.docs.parent)


def merged(found: list[Row]) -> Row:
    """One result of the same experiment with the parts of all, numbers to six digits."""
    if all("config" in one for one in found):
        return _runs(found)
    if len({(one["experiment"], json.dumps(one["setting"])) for one in found}) != 1:
        raise ValueError("these files are not of one experiment and setting")
    parts = {key: rows for one in found for key, rows in one["parts"].items() if not key.endswith("/done")}
    return dict(_rounded({**found[0], "parts": dict(sorted(parts.items()))}))


def _runs(found: list[Row]) -> Row:
    """Runs of the protocol on the same data, without their layers."""
    kept = ("config", "test", "size", "history")
    rows = [{**{key: run[key] for key in kept}, "method": run["config"]["method"], "rounds": len(run["rounds"])} for run in found]
    parts = {f"{run['config']['seed']}/{i}": [row] for i, (run, row) in enumerate(zip(found, rows, strict=True))}
    config, data = found[0]["config"], found[0]["data"]
    setting = {"model": config["model"], "width": config["width"], "data": data["name"], "size": data["shape"][1], "subset": None}
    setting |= {"goal": config["sparsity"], "epochs": config["epochs"]}
    whole = {"experiment": "protocol", "name": data["name"], "setting": setting, "environment": found[0]["environment"], "parts": parts}
    return dict(_rounded(whole))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.6g}") if isinstance(value, float) and math.isfinite(value) else value


# ------------------------------------------------------------------------------------------------- grouping


def rows_of(found: Row) -> list[Row]:
    """Every row with the seed, and the epochs of training before pruning."""
    listed = []
    for key, rows in found["parts"].items():
        if not rows:
            continue
        seed, *names = key.split("/")
        epoch = next(name for name in names if name.isdigit())
        listed += [{**row, "seed": int(seed), "epoch": int(epoch)} for row in rows]
    return listed


def over_seeds(rows: Iterable[Row], value: Callable[[Row], float], **where: Any) -> list[float]:
    """One value a seed, in the order of the seeds."""
    chosen = sorted((row for row in rows if all(row[key] == wanted for key, wanted in where.items())), key=lambda row: row["seed"])
    return [value(row) for row in chosen]


def spread(values: list[float], digits: int = 3) -> str:
    """Mean ± standard deviation over the seeds."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.{digits - 1}g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}g}{deviation}"


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in [header, ["---", *["---:"] * (len(header) - 1)], *rows]]


def title(found: Row, what: str) -> list[str]:
    setting = found["setting"]
    seeds = len({key.split("/")[0] for key in found["parts"]})
    subset = f", {setting['subset']:,} images" if setting["subset"] else ""
    data = "CIFAR-10 (JPEG copy)" if setting["data"] == "folder" else setting["data"]
    return [f"**{what}.** {setting['model']}, width {setting['width']:g}, {data}{subset}, {setting['size']} x {setting['size']}; {seeds} seeds.", ""]


def _methods(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in rows))


def _epochs(rows: list[Row]) -> list[int]:
    return sorted({row["epoch"] for row in rows})


# ------------------------------------------------------------------------------------------------- one table an experiment and question


def _expansions(found: Row) -> list[list[str]]:
    rows = rows_of(found)
    epochs, methods = _epochs(rows), _methods(rows)
    header = ["measure", *(f"{epoch} epochs" for epoch in epochs)]

    def of(value: Callable[[Row], float], sparsity: float, granularity: str = "filter") -> list[list[str]]:
        where = {"sparsity": sparsity, "granularity": granularity}
        return table(
            header,
            [[SHORT.get(m, m), *(spread(over_seeds(rows, value, method=m, epoch=e, **where)) for e in epochs)] for m in methods],
        )  # type: ignore[return-value]

    low = min(found["setting"]["sparsities"])
    asked: list[tuple[str, Callable[[Row], float], float, str]] = [
        ("ΔL on the images scored, 50 % of filters gone", lambda r: r["after"]["loss"] - r["before"]["loss"], 0.5, "filter"),
        ("ΔL on images not seen, 50 % of filters gone", lambda r: r["after"]["held_out"] - r["before"]["held_out"], 0.5, "filter"),
        ("‖g‖² after / before, as a power of ten, 50 % of filters gone", _norm_ratio, 0.5, "filter"),
        (f"ΔL, {low:.0%} of filters gone", lambda r: r["after"]["loss"] - r["before"]["loss"], low, "filter"),
        (f"ΔL predicted to first order, {low:.0%} of filters gone", lambda r: r["predicted_loss"], low, "filter"),
        (f"ΔL predicted to second order, {low:.0%} of filters gone", lambda r: r["predicted_loss"] + r["curvature"], low, "filter"),
        (f"Change of d‖θ‖²/dt over its size, {low:.0%} of filters gone", lambda r: _relative(r, "rate"), low, "filter"),
        (f"Change of d²‖θ‖²/dt² over its size, {low:.0%} of filters gone", lambda r: _relative(r, "acceleration"), low, "filter"),
        ("ΔL, 90 % of single weights gone", lambda r: r["after"]["loss"] - r["before"]["loss"], 0.9, "weight"),
    ]
    return [[*title(found, what), *of(value, sparsity, granularity)] for what, value, sparsity, granularity in asked]  # type: ignore[list-item]


def _norm_ratio(row: Row) -> float:
    return math.log10(max(row["after"]["gradient_norm"], 1e-30) / max(row["before"]["gradient_norm"], 1e-30))


def _relative(row: Row, what: str) -> float:
    return abs(row["after"][what] - row["before"][what]) / abs(row["before"][what])


def _stability(found: Row) -> list[list[str]]:
    rows = rows_of(found)
    tables = []
    for epoch in _epochs(rows):
        sizes = sorted({row["samples"] for row in rows})
        header = ["measure", *(f"{n} images" for n in sizes), f"same half, {sizes[-1]}", "scores that are 0"]
        lines = []
        for method in _methods(rows):
            where = {"method": method, "epoch": epoch}
            ranks = [spread(over_seeds(rows, lambda r: r["spearman"], samples=n, **where), 2) for n in sizes]
            last = {"samples": sizes[-1], **where}
            shared, zero = over_seeds(rows, lambda r: r["overlap"], **last), over_seeds(rows, lambda r: r["zero"], **last)
            lines.append([SHORT.get(method, method), *ranks, spread(shared, 2), f"{statistics.mean(zero):.1%}"])
        tables.append([*title(found, f"Spearman's correlation of the scores of two samples, {epoch} epochs"), *table(header, lines)])
    return tables


def _convergence(found: Row) -> list[list[str]]:
    rows = rows_of(found)
    tables = []
    for epoch in _epochs(rows):
        last = found["setting"]["epochs"]
        header = ["measure", "loss before training", "after 1 epoch", f"after {last} epochs", "mean over the epochs", "test accuracy"]
        lines = []
        for method in _methods(rows):
            where = {"method": method, "epoch": epoch}
            cells = [over_seeds(rows, lambda r, i=i: r["validation"][i][0], **where) for i in (0, 1, -1)]  # type: ignore[misc]
            area = over_seeds(rows, lambda r: statistics.mean(loss for loss, _ in r["validation"][1:]), **where)
            accuracy = over_seeds(rows, lambda r: 100 * r["test"][1], **where)
            lines.append([SHORT.get(method, method), *map(spread, [*cells, area]), f"{spread(accuracy)} %"])
        goal = found["setting"]["goal"]
        what = f"Validation loss, {goal:.0%} of filters gone after {epoch} epochs, then trained"
        tables.append([*title(found, what), *table(header, lines)])
    return tables


def _protocol(found: Row) -> list[list[str]]:
    rows = [{**row, "seed": row["config"]["seed"]} for rows in found["parts"].values() for row in rows]
    setting = found["setting"]
    header = ["measure", "rounds", "test accuracy", "loss after the last prune", "parameters left", "multiply-adds left"]
    lines = []
    for method, rounds in sorted({(row["method"], row["rounds"]) for row in rows}):
        where = {"method": method, "rounds": rounds}
        accuracy = over_seeds(rows, lambda r: 100 * r["test"]["accuracy"], **where)
        cut = over_seeds(rows, lambda r: r["history"][r["rounds"]]["loss"], **where)
        left = [over_seeds(rows, lambda r, w=w: 100 * r["size"]["pruned"][w] / r["size"]["dense"][w], **where) for w in ("parameters", "macs")]  # type: ignore[misc]
        lines.append([method, str(rounds), f"{spread(accuracy)} %", spread(cut), *(f"{spread(value)} %" for value in left)])
    what = f"The protocol, {setting['goal']:.0%} of filters gone, {setting['epochs']} epochs"
    return [[*title(found, what), *table(header, lines)]]


TABLES: dict[str, Callable[[Row], list[list[str]]]] = {
    "expansions": _expansions,
    "stability": _stability,
    "convergence": _convergence,
    "protocol": _protocol,
}


# ------------------------------------------------------------------------------------------------- figures


def figure(found: Row, folder: Path) -> None:
    """Predicted against actual ΔL for expansions, the loss over the epochs for convergence."""
    if found["experiment"] in ("stability", "protocol"):
        return
    rows = rows_of(found)
    epochs = _epochs(rows)
    made = Figure(figsize=(3.4 * len(epochs) + 2.2, 3.6), layout="constrained")
    places = made.subplots(1, len(epochs), squeeze=False)[0]
    for axes, epoch in zip(places, epochs, strict=True):
        own = [row for row in rows if row["epoch"] == epoch]
        (_scatter if found["experiment"] == "expansions" else _curves)(axes, own)
        axes.set_title(f"after {epoch} epochs", fontsize=9)
    made.legend(*places[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    made.savefig(folder / f"paper_{found['experiment']}_{found['name']}.png", dpi=110)


def _scatter(axes: Any, rows: list[Row]) -> None:
    colours = iter(colormaps["tab20"].colors)  # type: ignore[attr-defined]
    for method in _methods(rows):
        own = [row for row in rows if row["method"] == method and row["granularity"] == "filter"]
        axes.plot(
            [r["predicted_loss"] for r in own],
            [r["after"]["loss"] - r["before"]["loss"] for r in own],
            ".",
            label=SHORT.get(method, method),
            ms=5,
            color=next(colours),
        )
    axes.axline((0, 0), slope=1, color="grey", linewidth=0.6)
    axes.set(xscale="symlog", yscale="symlog", xlabel="ΔL to first order", ylabel="ΔL")


def _curves(axes: Any, rows: list[Row]) -> None:
    for method in _methods(rows):
        curves = [[loss for loss, _ in row["validation"]] for row in rows if row["method"] == method]
        axes.plot([statistics.mean(step) for step in zip(*curves, strict=True)], label=SHORT.get(method, method), linewidth=1)
    axes.set(xlabel="epochs after pruning", ylabel="validation loss", yscale="log")


if __name__ == "__main__":
    sys.exit(main())

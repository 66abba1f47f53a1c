"""The tables of ``benchmarks.accuracy.allocations``, made from its file.

    python -m benchmarks.accuracy.allocation_tables [benchmarks/results/accuracy/allocations.json] [--docs]

A cell has the mean over the seeds found; after tuning ± is the spread (standard deviation) over seeds.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.accuracy.allocations import GRANULARITIES, MEASURES, OUT
from benchmarks.accuracy.sharing import SHARINGS
from benchmarks.common.page import into_page
from benchmarks.common.record import ROOT

Row = dict[str, Any]
GUIDE = ROOT / "docs" / "guide" / "allocation.md"
MARKS = ("<!-- table of python -m benchmarks.accuracy.allocation_tables -->", "<!-- end of table -->")
MARKS_OF_DRAWS = ("<!-- table of draws -->", "<!-- end of draws -->")
MARKS_OF_LOSSES = ("<!-- table of losses -->", "<!-- end of losses -->")
DRAWS = OUT.with_name("allocations_draws.json")
"""A study of magnitude alone, in several draws of the images that nets are tuned on."""
SPARSITIES = (0.3, 0.5, 0.7)


def rows_of(rows: Iterable[Row], **asked: Any) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in asked.items())]


def mean(rows: list[Row], key: str) -> float | None:
    values = [row[key] for row in rows if row[key] is not None]
    return statistics.mean(values) if values else None


def at_once(rows: list[Row]) -> str:
    """Loss, accuracy, and the least share that any layer keeps."""
    if not rows:
        return "-"
    emptied = max(row["emptied"] for row in rows)
    least = f"**{emptied} empty**" if emptied else f"{min(row['least_kept'] for row in rows):.0%}"
    return f"{mean(rows, 'loss'):.2f} / {mean(rows, 'accuracy'):.0%} / {least}"


def after_tuning(rows: list[Row]) -> str:
    if not rows:
        return "-"
    found = [row["accuracy"] for row in rows]
    spread = f" ± {100 * statistics.stdev(found):.1f}" if len(found) > 1 else ""
    return f"{100 * statistics.mean(found):.1f}{spread}"


def left(rows: list[Row]) -> str:
    """The share of parameters, and of FLOPs, that is left."""
    if not rows:
        return "-"
    flops = mean(rows, "flops")
    return f"{mean(rows, 'parameters'):.0%}" + ("" if flops is None else f" / {flops:.0%}")


def table(rows: list[Row], sparsities: Iterable[float], cell: Callable[[list[Row]], str]) -> list[str]:
    """Allocations down, sparsities and measures across."""
    across = [(sparsity, measure) for sparsity in sparsities for measure in MEASURES]
    across = [one for one in across if rows_of(rows, sparsity=one[0], measure=one[1])]
    lines = ["| allocation | " + " | ".join(f"{measure} {sparsity:.0%}" for sparsity, measure in across) + " |"]
    lines.append("|---|" + "---:|" * len(across))
    for sharing in SHARINGS:
        cells = [
            cell(rows_of(rows, sharing=sharing, sparsity=sparsity, measure=measure)) for sparsity, measure in across
        ]
        lines.append(f"| {sharing} | " + " | ".join(cells) + " |")
    return lines


def page(found: dict[str, Any]) -> str:
    lines = []
    for name, net in found["nets"].items():
        said = "; ".join(
            f"accuracy {row['tested'][1]:.1%}, after the same tuning {row['tuned'][1]:.1%}" for row in net["dense"]
        )
        lines += [f"## {name}", "", f"Dense: {said}.", ""]
        for granularity in GRANULARITIES:
            rows, tuned = (rows_of(net[stage], granularity=granularity) for stage in ("at once", "tuned"))
            for sparsity in SPARSITIES:
                if some := rows_of(rows, sparsity=sparsity):
                    lines += [f"{name}, {granularity}, {sparsity:.0%}, at once: loss / accuracy / least kept", ""]
                    lines += [*table(some, [sparsity], at_once), ""]
                    lines += [f"{name}, {granularity}, {sparsity:.0%}: parameters (and FLOPs) left", ""]
                    lines += [*table(some, [sparsity], left), ""]
            for sparsity, cost in product(SPARSITIES, ("units", "flops")):
                if some := rows_of(tuned, sparsity=sparsity, cost=cost):
                    lines += [f"{name}, {granularity}, {sparsity:.0%} of {cost}, accuracy after tuning", ""]
                    lines += [*table(some, [sparsity], after_tuning), ""]
    return "\n".join(lines)


def guide(found: dict[str, Any]) -> str:
    """The table of the guide: accuracy after tuning, at half of the channels and at half of the FLOPs."""
    asked = [
        (net, measure, cost)
        for net in ("resnet20", "mobilenet")
        for measure in ("magnitude", "taylor")
        for cost in ("units", "flops")
    ]
    header = [f"{net}, {measure}, {'channels' if cost == 'units' else 'FLOPs'}" for net, measure, cost in asked]
    lines = ["| allocation | " + " | ".join(header) + " |", "|---|" + "---:|" * len(asked)]
    for sharing in SHARINGS:
        cells = []
        for net, measure, cost in asked:
            asks = {"granularity": "channel", "sparsity": 0.5, "sharing": sharing, "measure": measure, "cost": cost}
            cells.append(after_tuning(rows_of(found["nets"][net]["tuned"], **asks)))
        lines.append(f"| {sharing} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draws(found: dict[str, Any]) -> str:
    """Accuracy after tuning, and the FLOPs left, of what was measured for every way, in each draw of images."""
    return _by_way(found, "tuned", lambda rows, cost: after_tuning(rows) + _flops_left(rows, cost))


def losses(found: dict[str, Any]) -> str:
    """The loss before tuning, of what was measured for every way."""
    return _by_way(found, "at once", lambda rows, _: f"{mean(rows, 'loss'):.2f}")


def _flops_left(rows: list[Row], cost: str) -> str:
    flops = None if cost == "flops" else mean(rows, "flops")
    return "" if flops is None else f" / {flops:.0%}"


def _by_way(found: dict[str, Any], stage: str, cell: Callable[[list[Row], str], str]) -> str:
    """Ways across, and what was pruned down: of a net, by a granularity, to a sparsity of units or FLOPs."""
    every = [row for net in found["nets"].values() for row in net["tuned"]]
    ways = [sharing for sharing in SHARINGS if rows_of(every, sharing=sharing)]
    lines = ["| pruned | draws | " + " | ".join(ways) + " |", "|---|---:|" + "---:|" * len(ways)]
    for name, net in found["nets"].items():
        rows = rows_of(net[stage], measure="magnitude")
        for granularity, sparsity, cost in sorted({(row["granularity"], row["sparsity"], row["cost"]) for row in rows}):
            words = {"granularity": granularity, "sparsity": sparsity, "cost": cost}
            if seeds := _seeds_of_all(rows_of(rows, **words), ways):
                of_ways = [rows_of(rows, sharing=way, **words) for way in ways]
                cells = [cell([row for row in of_way if row["seed"] in seeds], cost) for of_way in of_ways]
                what = f"{sparsity:.0%} of {'FLOPs' if cost == 'flops' else granularity + 's'}"
                lines.append(f"| {name}, {what} | {len(seeds)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _seeds_of_all(rows: list[Row], ways: list[str]) -> set[int]:
    """The draws in which every way was measured."""
    seeds = [{row["seed"] for row in rows_of(rows, sharing=way)} for way in ways]
    return set.intersection(*seeds) if seeds else set()


def main(arguments: list[str]) -> None:
    docs = "--docs" in arguments
    paths = [argument for argument in arguments if argument != "--docs"]
    found = json.loads(Path(paths[0] if paths else OUT).read_text())
    print(page(found))
    if docs:
        into_page(GUIDE, MARKS, guide(found))
        of_draws = json.loads((ROOT / DRAWS).read_text())
        into_page(GUIDE, MARKS_OF_DRAWS, draws(of_draws))
        into_page(GUIDE, MARKS_OF_LOSSES, losses(of_draws))


if __name__ == "__main__":
    main(sys.argv[1:])

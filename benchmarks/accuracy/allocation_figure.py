"""The figure of the guide: what ways of sharing out sparsity leave of the narrowest layer, and of the FLOPs.

    python -m benchmarks.accuracy.allocation_figure [--out docs/results/figures/allocations.png]

Drawn from what ``benchmarks.accuracy.allocations`` found: channels by magnitude, of each net, at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.accuracy.allocation_tables import SPARSITIES, rows_of
from benchmarks.accuracy.allocations import OUT
from benchmarks.common.record import ROOT

FIGURE = ROOT / "docs" / "results" / "figures" / "allocations.png"
DRAWN = ("raw, one stays", "raw, at most 80 %", "mean", "lamp", "equal")
"""Ways in which no layer is emptied."""
SHOWN = {"least_kept": "of the narrowest layer, %", "flops": "FLOPs, %"}


def points(net: dict[str, Any], sharing: str, key: str) -> list[tuple[float, float]]:
    """What is left at each sparsity, in per cent."""
    asked = {"granularity": "channel", "measure": "magnitude", "sharing": sharing, "seed": 0, "cost": "units"}
    found = {sparsity: rows_of(net["at once"], sparsity=sparsity, **asked) for sparsity in SPARSITIES}
    return [(100 * sparsity, 100 * rows[0][key]) for sparsity, rows in found.items() if rows]


def draw(found: dict[str, Any], out: Path) -> None:
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.subplots(len(SHOWN), len(found["nets"]), sharex=True, sharey="row", squeeze=False)
    for name, place in zip(found["nets"], axes[0], strict=True):
        place.set(title=name, yscale="log")
    for place in axes[-1]:
        place.set_xlabel("channels gone, %")
    for row, (key, label) in zip(axes, SHOWN.items(), strict=True):
        row[0].set_ylabel(f"left {label}")
        for place, net in zip(row, found["nets"].values(), strict=True):
            for sharing in DRAWN:
                place.plot(*zip(*points(net, sharing, key), strict=True), marker="o", markersize=3, label=sharing)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(DRAWN), frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.allocation_figure")
    parser.add_argument("--out", type=Path, default=FIGURE)
    draw(json.loads((ROOT / OUT).read_text(encoding="utf-8")), parser.parse_args(arguments).out)


if __name__ == "__main__":
    main(sys.argv[1:])

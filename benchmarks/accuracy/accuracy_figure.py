"""The figure of the landing page: accuracy against FLOPs, of what ways of sharing out sparsity leave.

    python -m benchmarks.accuracy.accuracy_figure [--out docs/results/figures/accuracy_flops.png]

Drawn from the draws of ``benchmarks.accuracy.allocations``: channels by magnitude, after a short training.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.accuracy.allocation_figure import DRAWN
from benchmarks.accuracy.allocation_tables import DRAWS, mean, rows_of
from benchmarks.common.record import ROOT

FIGURE = ROOT / "docs" / "results" / "figures" / "accuracy_flops.png"
NETS = {"resnet20": "ResNet-20", "mobilenet": "MobileNet-V1, half width"}


def points(net: dict[str, Any], sharing: str) -> list[tuple[float, float]]:
    """FLOPs and accuracy left, in per cent, mean over draws: of targets in channels and in FLOPs, by FLOPs."""
    asked = {"granularity": "channel", "measure": "magnitude", "sharing": sharing}
    rows = rows_of(net["tuned"], **asked)
    targets = sorted({(row["cost"], row["sparsity"]) for row in rows})
    groups = [rows_of(rows, cost=cost, sparsity=sparsity) for cost, sparsity in targets]
    return sorted((100 * (mean(group, "flops") or 0), 100 * (mean(group, "accuracy") or 0)) for group in groups)


def draw(found: dict[str, Any], out: Path) -> None:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, len(NETS))
    for place, (name, title) in zip(axes, NETS.items(), strict=True):
        net = found["nets"][name]
        for sharing in DRAWN:
            place.plot(*zip(*points(net, sharing), strict=True), marker="o", markersize=3, label=sharing)
        place.axhline(100 * net["dense"][0]["tuned"][1], color="0.5", linestyle=":", linewidth=1)
        place.set(title=title, xlabel="FLOPs left, %")
    axes[0].set_ylabel("accuracy after 60 steps, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(DRAWN), frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.accuracy_figure")
    parser.add_argument("--out", type=Path, default=FIGURE)
    draw(json.loads((ROOT / DRAWS).read_text(encoding="utf-8")), parser.parse_args(arguments).out)


if __name__ == "__main__":
    main(sys.argv[1:])

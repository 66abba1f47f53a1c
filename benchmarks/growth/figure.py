"""The curves of what grows, each beside what it is held against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

_SHOWN = ("tensors", "tokens", "concatenations")
"""Those of which the figure has time above and memory below."""
_QUANTITIES = {"seconds": ("seconds", 1.0), "peak": ("MB besides", 1e6)}


def draw(found: dict[str, Any], out: Path) -> None:
    shown = [found["growths"][name] for name in _SHOWN if name in found["growths"]]
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    axes = figure.subplots(len(_QUANTITIES), len(shown), sharex="col", squeeze=False)
    for (key, (label, unit)), row in zip(_QUANTITIES.items(), axes, strict=True):
        row[0].set_ylabel(label)
        for place, growth in zip(row, shown, strict=True):
            place.set(xscale="log", yscale="log")
            for name, side in growth["sides"].items():
                points = sorted((int(size), point[key] / unit) for size, point in side["points"].items())
                place.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    for place, growth in zip(axes[0], shown, strict=True):
        place.set_title(growth["grows"], fontsize=8)
        place.legend(frameon=False, fontsize=7)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100)

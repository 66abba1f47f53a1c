"""What a prune is warned of: layers without units, and ties that the order of the model decided."""

from __future__ import annotations

import warnings

from torch_flowprune.pruning.report import Report


class LayerCollapseWarning(UserWarning):
    """A prune has left a layer without any unit: nothing passes through it any more."""


class TiedScoresWarning(UserWarning):
    """Over a hundredth of the units tie with the last that went and stay all the same.

    Their order in the model decided.
    """


def warn_of(report: Report, stacklevel: int) -> None:
    """Warn of what a report shows."""
    if report.tied > report.units // 100:
        same = f"{report.tied:,} units that stay have exactly the score of the last that went, {report.threshold:.3g}"
        text = f"{same}: model order decided, not the measure"
        zero = (
            "; a zero-initialised branch or head gives its layers no gradient: train a little first, or pass exclude="
            if report.threshold == 0
            else ""
        )
        warnings.warn(text + zero, TiedScoresWarning, stacklevel=stacklevel)
    empty = [
        layer.name for layer in report.layers if layer.units and layer.pruned == layer.units and layer.newly_pruned
    ]
    if empty:
        text = (
            f"nothing is left of {', '.join(empty)}: no signal passes there any more; min_keep= keeps some units of "
            "every layer"
        )
        warnings.warn(text, LayerCollapseWarning, stacklevel=stacklevel)

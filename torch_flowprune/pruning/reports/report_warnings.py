"""What a prune is warned of: layers without units, and ties that the order of the model decided."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch_flowprune.masking import LostZeros
from torch_flowprune.pruning.reports.report import Layer, Report


class LayerCollapseWarning(UserWarning):
    """Pruning has left a layer without any unit, or with less than a tenth of its filters or channels.

    Little or no signal passes through such a layer. ``min_keep=``, ``max_sparsity=`` or another ``allocation=`` avoids
    it.

    See Also:
        :func:`~torch_flowprune.global_prune`: warns of it.
    """


class TiedScoresWarning(UserWarning):
    """More than one in a hundred units have the score of the last pruned unit, and are kept.

    Model order decided which of them were pruned, not the measure. Often the score is 0: a zero-initialised branch, or
    dead units.

    See Also:
        :func:`~torch_flowprune.global_prune`: warns of it.
    """


def warn_of_ties(rounds: Sequence[Report], stacklevel: int) -> None:
    """Warn where the order of the model decided what stays, of the round where it did most."""
    report = max(rounds, key=lambda report: _decided_by_order(report, rounds[-1]))
    if _decided_by_order(report, rounds[-1]) > report.units // 100:
        same = f"{report.tied:,} kept units have exactly the score of the last pruned unit"
        which = "" if report.threshold is None else f", {report.threshold:.3g}"
        text = f"{same}{which}: model order decided, not the measure"
        zero = (
            "; a zero-initialised branch or head gives its layers no gradient: train a little first, or pass exclude="
            if report.threshold == 0
            else ""
        )
        warnings.warn(text + zero, TiedScoresWarning, stacklevel=stacklevel)


def _decided_by_order(report: Report, last: Report) -> int:
    """Its ties; those of units that score nothing are not counted where later rounds remove them as well."""
    later = last.pruned - report.pruned
    return 0 if report.threshold == 0 and report.tied <= later else report.tied


def warn_of_collapse(report: Report, stacklevel: int) -> None:
    """Warn of layers that have nothing left, or nearly."""
    newly = {layer.name for layer in report.layers if layer.newly_pruned}
    if empty := [name for name in report.emptied if name in newly]:
        text = (
            f"nothing is left of {', '.join(empty)}: no signal passes there any more; min_keep= keeps some units of "
            "every layer"
        )
        warnings.warn(text, LayerCollapseWarning, stacklevel=stacklevel)
    if thin := [layer for layer in report.layers if _is_thin(layer)]:
        named = ", ".join(f"{layer.name} ({layer.units - layer.pruned} of {layer.units})" for layer in thin[:8])
        more = f" and {len(thin) - 8} more" if len(thin) > 8 else ""
        warnings.warn(
            f"less than a tenth is left of {named}{more}: little passes there; use normalize='mean' or "
            "allocation='layer', or cap layers with max_sparsity=0.8",
            LayerCollapseWarning,
            stacklevel=stacklevel,
        )


def _is_thin(layer: Layer) -> bool:
    """Whether a layer of filters or channels, units of several weights, has become less than a tenth as wide."""
    left = layer.units - layer.pruned
    return layer.weights > layer.units and bool(layer.newly_pruned) and 0 < left < layer.units / 10


def warn_of_lost_zeros(lost: Sequence[LostZeros], stacklevel: int) -> None:
    """Warn of masked weights that a model fills again before it computes with them."""
    if lost:
        named = ", ".join(
            f"{one.name} ({one.kind}: {one.of_weight:.1%} of the weight is zero, {one.of_kernel:.1%} of the kernel)"
            for one in lost[:8]
        )
        more = f" and {len(lost) - 8} more" if len(lost) > 8 else ""
        warnings.warn(
            f"zeros do not survive what the model makes of {named}{more}: it computes with a kernel that it derives "
            "from the weight (weight standardisation?); whole filters (granularity='filter') do survive "
            "standardisation, or leave these out with exclude=",
            UserWarning,
            stacklevel=stacklevel,
        )

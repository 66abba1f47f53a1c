"""One round: the chosen units are masked, and a report says what that did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from torch_flowprune.channels import Size
from torch_flowprune.gradients import Flow
from torch_flowprune.inputs import Ranks, Target, local, no_collection, parameters_of
from torch_flowprune.masking import put_masks
from torch_flowprune.pruning.reports import Layer, Report, Spent
from torch_flowprune.scoring import Candidates, Scores, lefts, masks_of, numbers, ranks_of, targets_of
from torch_flowprune.selection import Choice, Plan, living_units


@no_collection()
def renewed(model: nn.Module, found: Candidates) -> Candidates:
    """The candidates with the masks that the model has now."""
    return _renewed(parameters_of(model), found)


def _renewed(known: dict[str, Target], found: Candidates) -> Candidates:
    return {name: candidate.renewed(known) for name, candidate in found.items()}


@no_collection()
def prune_once(model: nn.Module, found: Candidates, scores: Scores, choice: Choice, point: Flow) -> Report:
    """Put the masks on, and say what they did; a parameter that keeps everything gets none."""
    before, ranks = lefts(found), ranks_of(found)
    after = [choice.kept[name] for name in found]
    changed = [name for name, was, now in zip(found, before, after, strict=True) if now < was]
    masks = masks_of(found, {name: choice.keeps[name] for name in changed})
    loss, norm = _predicted(point, "g", -1, masks, ranks), _predicted(point, "Hg", -2, masks, ranks)
    with ranks.together():
        put_masks(model, targets_of(found), masks)
    known = parameters_of(model)
    now = _renewed(known, found)
    layers = layers_of(now, before, after, choice.why)
    dense, small = sizes_of(now)
    return Report(
        scores.method,
        scores.granularity,
        layers,
        choice.threshold,
        choice.tied,
        point.loss,
        point.samples,
        loss,
        norm,
        dense,
        small,
        sum(target.parameter.numel() for target in known.values()),
        counted=point.counted,
    )


def layers_of(
    now: Candidates, before: Sequence[int], after: Sequence[int], why: Mapping[str, str]
) -> tuple[Layer, ...]:
    """What a report says of each candidate, whose units left were so many before, and are so many now."""
    counts = numbers([candidate.kept_weights(left) for candidate, left in zip(now.values(), after, strict=True)])
    kept = ranks_of(now).add_up(counts)
    return tuple(
        Layer(
            name,
            candidate.shape,
            len(candidate),
            len(candidate) - left,
            was - left,
            candidate.weights,
            candidate.weights - weights,
            why[name],
        )
        for (name, candidate), was, left, weights in zip(now.items(), before, after, kept, strict=True)
    )


def sizes_of(now: Candidates) -> tuple[Size | None, Size | None]:
    """What the model costs with all units, and with those that are left, where that is known."""
    costs = next((candidate.costs for candidate in now.values()), None)
    return (None, None) if costs is None else (costs.dense, costs.of(living_units(now)))


def with_spent(report: Report, plan: Plan, model: nn.Module, found: Candidates) -> Report:
    """With what became of targets in what the model costs, or of a number of units."""
    if plan.spending is None:
        return replace(report, asked=plan.asked if plan.asked != report.pruned else None)
    units = living_units(renewed(model, found))
    return replace(report, spent=tuple(dict.fromkeys(Spent(*one.spent(units)) for one in plan.spending.allowances)))


def _predicted(point: Flow, kind: str, factor: int, masks: dict[str, Tensor], ranks: Ranks) -> float | None:
    """The sum ``factor`` · Σ θ·derivative over what goes.

    The first-order change of the loss (g, −1) or of ‖g‖² (Hg, −2).
    """
    if getattr(point, kind) is None:
        return None
    derivative = point.tensors(kind)
    parts = [
        torch.where(local(mask), 0, local(point.theta[name]) * local(derivative[name])).sum(dtype=torch.float64)
        for name, mask in masks.items()
        if ranks.alone or ranks.counts(point.theta[name])
    ]
    total = torch.stack([part.to(parts[0].device) for part in parts]).sum().cpu() if parts else torch.zeros(())
    return factor * ranks.summed(total.double()).item() + 0.0


def joined(reports: Sequence[Report]) -> Report:
    """The rounds as one: the last one's state, everything that went, the most ties, the predictions summed."""
    last = reports[-1]
    if len(reports) == 1:
        return last
    newly = [sum(report.layers[i].newly_pruned for report in reports) for i in range(len(last.layers))]
    layers = tuple(replace(layer, newly_pruned=count) for layer, count in zip(last.layers, newly, strict=True))
    changes = [(report.predicted_loss_change, report.predicted_gradient_norm_change) for report in reports]
    loss, norm = (None if values[0] is None else sum(values) for values in zip(*changes, strict=True))
    ties = max(report.tied for report in reports)
    return replace(last, layers=layers, tied=ties, predicted_loss_change=loss, predicted_gradient_norm_change=norm)

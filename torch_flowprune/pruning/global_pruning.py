"""The route in one call: flow, measure, selection, masks, report."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from torch_flowprune.gradients import Flow, flow
from torch_flowprune.inputs import Closure, Loss, Pair, Pattern, Ranks, parameters_of, unwrapped
from torch_flowprune.masking import all_or_nothing, apply_masks
from torch_flowprune.pruning.report import Layer, Report
from torch_flowprune.scoring import (
    Candidates,
    Granularity,
    Measure,
    Scores,
    candidates_of,
    given,
    lefts,
    measures,
    on_access,
    targets_of,
)
from torch_flowprune.selection import (
    Choice,
    Schedule,
    check_rounds,
    choose,
    counted,
    floors,
    living_units,
    numbers,
    pools,
)


class LayerCollapseWarning(UserWarning):
    """A prune has left a layer without any unit: nothing passes through it any more."""


class TiedScoresWarning(UserWarning):
    """Over a hundredth of the units tie with the last that went and stay all the same.

    Their order in the model decided.
    """


def global_prune(
    model: nn.Module,
    method: str | Measure = "magnitude",
    sparsity: float | None = None,
    *,
    amount: float | None = None,
    granularity: Granularity | None = None,
    scope: str = "global",
    data: object = None,
    loss: Loss | None = None,
    closure: Closure | None = None,
    theta0: Mapping[str, Tensor] | None = None,
    max_samples: int | None = None,
    temperature: float = 1.0,
    mode: str = "eval",
    parameters: Iterable[Pair] | None = None,
    include: Pattern | Sequence[Pattern] | None = None,
    exclude: Pattern | Sequence[Pattern] | None = None,
    min_keep: float | None = None,
    rounds: int = 1,
    schedule: str | Schedule = "exponential",
    generator: torch.Generator | None = None,
    progress: bool | None = None,
    max_memory: int | str | None = None,
    offload: bool = False,
    autocast: torch.dtype | None = None,
    scores: Scores | Mapping[str, Tensor] | Mapping[Pair, Tensor] | None = None,
    example_inputs: Any = None,
    scored_by: str = "producer",
    cost: str = "units",
) -> Report:
    """Prune the units of lowest score over the whole model, in place.

    Exactly ``round(sparsity · n)`` of the n prunable units are gone afterwards, ties broken in model order. What was
    pruned before stays pruned and counts. An error leaves the model as it was.

    Args:
        model: any module; pruned in place. Of a ``DistributedDataParallel`` model every rank makes the same call, and
            all get the same masks.
        method: a measure's name (``"loss_preservation"``) or a function of rows.
        sparsity: the share of all prunable units that is gone after the call, from 0 to 1; for ``"n:m"`` it follows
            from the pattern.
        amount: instead of ``sparsity``, torch's meaning: a fraction of what is left (float) or a number of units (int).
        granularity: ``"weight"`` (if left out), ``"filter"``, ``"n:m"`` such as ``"2:4"``, or ``"channel"``: coupled
            channels, which :func:`~torch_flowprune.shrink` then removes physically.
        scope: ``"global"``, one ranking over all layers, or ``"layer"``, every layer to the same sparsity.
        data, loss, closure, theta0, max_samples, temperature, mode, progress, max_memory, offload, autocast: what the
            scores are taken over, and with what, see :func:`~torch_flowprune.flow`.
        parameters, include, exclude: which parameters, see :func:`~torch_flowprune.inputs.parameters.prunable`.
        min_keep: how many units every layer keeps at least: a number (int) or a fraction of the layer (float).
        rounds: prune in this many steps, scoring anew before each.
        schedule: the sparsity after each round: ``"exponential"``, ``"linear"``, ``"cubic"``, ``"paper"`` or a function
            of ``(rounds, start, target)``.
        generator: the source of randomness for ``random``.
        scores: scores computed earlier, by parameter name or ``(module, name)``: no sweep is made, and no ``method`` is
            needed.
        example_inputs: inputs that show the shapes that ``synflow`` and channels need, where there is no data.
        scored_by: for channels, which of the coupled slices a measure reads: ``"producer"``, ``"group"``, ``"norm"`` or
            ``"scale"``.
        cost: what ``sparsity`` and ``amount`` are shares of: ``"units"``, or for channels the ``"parameters"`` or
            ``"flops"`` of the whole model. The units of lowest score then go, as few as bring what ``shrink`` leaves
            down to the target; every group keeps one.

    Returns:
        What was removed, where, and what it was predicted to cost.

    Raises:
        ValueError, TypeError: for bad arguments, naming what was expected, what was found and the way out; before the
        model is touched.

    Warns:
        LayerCollapseWarning: if a layer lost its last unit.
        TiedScoresWarning: if the order of the layers decided more than the scores did.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> report = global_prune(model, "magnitude", sparsity=0.5)
    >>> report.pruned, report.units
    (40, 80)
    """
    wrapped, model, ranks = model, unwrapped(model), Ranks.of(model)
    measure = measures.resolve(method)
    granularity = granularity or (scores.granularity if isinstance(scores, Scores) else "weight")
    chosen = None if granularity == "channel" else _parameters(model, parameters, include, scores)
    found = candidates_of(
        model,
        granularity,
        chosen or parameters,
        include,
        exclude,
        scored_by=scored_by,
        data=data,
        example_inputs=example_inputs,
    )
    fixed = None if scores is None else given(scores, found, granularity)
    least = floors(found, min_keep, cost)
    plan = pools(found, sparsity, amount, scope, rounds, schedule, cost, least)
    check_rounds(rounds, fixed, data)
    reports: list[Report] = []
    with all_or_nothing(targets_of(found).values()):
        for round_ in range(rounds):
            found = _renewed(model, found)
            point = flow(
                wrapped,
                data,
                loss=loss,
                needs=() if fixed else measures.needs(measure),
                closure=closure,
                parameters=targets_of(found),
                theta0=theta0,
                max_samples=max_samples,
                temperature=temperature,
                mode=mode,
                example_inputs=example_inputs,
                progress=progress,
                max_memory=max_memory,
                offload=offload,
                autocast=autocast,
            )
            current = fixed or on_access(point, measure, found, granularity, generator)
            choice = choose(found, current, plan, round_, least)
            if not ranks.alone:
                ranks.agree(choice.keeps.values())
                choice = replace(choice, kept=counted(choice.keeps))
            reports.append(_apply(model, found, current, choice, point))
        report = _joined(reports)
        _warn(report)  # inside: where warnings are errors, they leave the model as it was
    return report


def _parameters(
    model: nn.Module, parameters: Iterable[Pair] | None, include: object, scores: Mapping[Any, Tensor] | None
) -> Iterable[Pair] | None:
    """The pairs to prune: with scores given and no other choice made, those that have scores."""
    if scores is None or parameters is not None or include is not None:
        return parameters
    if not scores:
        raise ValueError("scores= is empty: expected scores by parameter name, as fp.scores returns them")
    known = parameters_of(model)
    if unknown := [key for key in scores if isinstance(key, str) and key not in known]:
        raise ValueError(f"scores= has entries for parameters this model does not have: {', '.join(unknown[:5])}")
    return [known[key].owners[0] if isinstance(key, str) else key for key in scores]


def _renewed(model: nn.Module, found: Candidates) -> Candidates:
    known = parameters_of(model)
    return {name: candidate.renewed(known) for name, candidate in found.items()}


def prune_to(
    model: nn.Module,
    found: Candidates,
    scores: Scores,
    sparsity: float,
    point: Flow,
    min_keep: float | None = None,
    cost: str = "units",
) -> Report:
    """One round with scores at hand, all layers in one ranking; what it would warn of is in the report."""
    least = floors(found, min_keep, cost)
    choice = choose(found, scores, pools(found, sparsity, None, "global", 1, "linear", cost, least), 0, least)
    return _apply(model, found, scores, choice, point)


def _apply(model: nn.Module, found: Candidates, scores: Scores, choice: Choice, point: Flow) -> Report:
    """Put the masks on, and say what they did; a parameter that keeps everything gets none."""
    before = numbers(lefts(found))
    after = [choice.kept[name] for name in found]
    changed = [name for name, was, now in zip(found, before, after, strict=True) if now < was]
    masks = _merged([found[name].masks(choice.keeps[name]) for name in changed])
    loss, norm = _predicted(point, "g", -1, masks), _predicted(point, "Hg", -2, masks)
    apply_masks(model, masks, copy=False)
    now = _renewed(model, found)
    kept = numbers([candidate.kept_weights(left) for candidate, left in zip(now.values(), after, strict=True)])
    layers = tuple(
        Layer(
            name,
            candidate.shape,
            len(candidate),
            len(candidate) - left,
            was - left,
            candidate.weights,
            candidate.weights - weights,
        )
        for (name, candidate), was, left, weights in zip(now.items(), before, after, kept, strict=True)
    )
    costs = next((candidate.costs for candidate in now.values()), None)
    dense, small = (None, None) if costs is None else (costs.dense, costs.of(living_units(now)))
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
    )


def _merged(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One mask a parameter: what any part removes is removed."""
    masks: dict[str, Tensor] = {}
    for part in parts:
        masks |= {name: mask & masks[name] if name in masks else mask for name, mask in part.items()}
    return masks


def _predicted(point: Flow, kind: str, factor: int, masks: dict[str, Tensor]) -> float | None:
    """The sum ``factor`` · Σ θ·derivative over what goes.

    The first-order change of the loss (g, −1) or of ‖g‖² (Hg, −2).
    """
    if getattr(point, kind) is None:
        return None
    derivative = point.tensors(kind)
    parts = [
        torch.where(mask, 0, point.theta[name] * derivative[name]).sum(dtype=torch.float64)
        for name, mask in masks.items()
    ]
    return factor * torch.stack([part.to(parts[0].device) for part in parts]).sum().item() if parts else 0.0


def _joined(reports: Sequence[Report]) -> Report:
    """The rounds as one: the last one's state, everything that went, the predictions summed."""
    last = reports[-1]
    newly = [sum(report.layers[i].newly_pruned for report in reports) for i in range(len(last.layers))]
    layers = tuple(replace(layer, newly_pruned=count) for layer, count in zip(last.layers, newly, strict=True))
    changes = [(report.predicted_loss_change, report.predicted_gradient_norm_change) for report in reports]
    loss, norm = (None if values[0] is None else sum(values) for values in zip(*changes, strict=True))
    return replace(last, layers=layers, predicted_loss_change=loss, predicted_gradient_norm_change=norm)


def _warn(report: Report) -> None:
    if report.tied > report.units // 100:
        same = f"{report.tied:,} units that stay have exactly the score of the last that went, {report.threshold:.3g}"
        text = f"{same}: model order decided, not the measure"
        zero = (
            "; a zero-initialised branch or head gives its layers no gradient: train a little first, or pass exclude="
            if report.threshold == 0
            else ""
        )
        warnings.warn(text + zero, TiedScoresWarning, stacklevel=3)
    empty = [
        layer.name for layer in report.layers if layer.units and layer.pruned == layer.units and layer.newly_pruned
    ]
    if empty:
        text = (
            f"nothing is left of {', '.join(empty)}: no signal passes there any more; min_keep= keeps some units of "
            "every layer"
        )
        warnings.warn(text, LayerCollapseWarning, stacklevel=3)

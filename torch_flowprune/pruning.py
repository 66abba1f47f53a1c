"""The route in one call: flow, measure, selection, masks, report."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from torch_flowprune import measures
from torch_flowprune.data import Closure, Loss
from torch_flowprune.flow import Flow, flow
from torch_flowprune.masking import all_or_nothing, apply_masks
from torch_flowprune.measures import Measure
from torch_flowprune.plan import alive_units, check_rounds, current, floors, lefts, pools
from torch_flowprune.ranks import Ranks
from torch_flowprune.report import Layer, Report
from torch_flowprune.schedules import Schedule
from torch_flowprune.scoring import Cuts, Scores, cut, evaluate
from torch_flowprune.selection import Cut, lowest, lowest_in_blocks, numbers, with_floors
from torch_flowprune.targets import Pair, Pattern, Target, parameters_of, unwrapped
from torch_flowprune.units import Blocks, Granularity, Units

Keeps: TypeAlias = dict[str, Tensor]


class LayerCollapseWarning(UserWarning):
    """A prune has left a layer without any unit: nothing passes through it any more."""


class TiedScoresWarning(UserWarning):
    """Over a hundredth of the units tie with the last that went and stay all the same: their order in the model decided."""


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
    scores: Scores | Mapping[str, Tensor] | Mapping[Pair, Tensor] | None = None,
    example_inputs: Any = None,
) -> Report:
    """Prune the units of lowest score over the whole model, in place.

    Exactly ``round(sparsity · n)`` of the n prunable units are gone afterwards, ties broken in model order. What was pruned before stays
    pruned and counts. An error leaves the model as it was.

    Args:
        model: any module; pruned in place. Of a ``DistributedDataParallel`` model every rank makes the same call, and all get the same masks.
        method: a measure's name (``"loss_preservation"``) or a function of rows.
        sparsity: the share of all prunable units that is gone after the call, from 0 to 1; for ``"n:m"`` it follows from the pattern.
        amount: instead of ``sparsity``, torch's meaning: a fraction of what is left (float) or a number of units (int).
        granularity: ``"weight"`` (if left out), ``"filter"`` or ``"n:m"`` such as ``"2:4"``.
        scope: ``"global"``, one ranking over all layers, or ``"layer"``, every layer to the same sparsity.
        data, loss, closure, theta0, max_samples, temperature, mode, progress: what the scores are taken over, see
            :func:`~torch_flowprune.flow.flow`.
        parameters, include, exclude: which parameters, see :func:`~torch_flowprune.targets.prunable`.
        min_keep: how many units every layer keeps at least: a number (int) or a fraction of the layer (float).
        rounds: prune in this many steps, scoring anew before each.
        schedule: the sparsity after each round: ``"exponential"``, ``"linear"``, ``"cubic"``, ``"paper"`` or a function of
            ``(rounds, start, target)``.
        generator: the source of randomness for ``random``.
        scores: scores computed earlier, by parameter name or ``(module, name)``: no sweep is made, and no ``method`` is needed.
        example_inputs: inputs that show the shape ``synflow`` needs, where there is no data.

    Returns:
        What was removed, where, and what it was predicted to cost.

    Raises:
        ValueError, TypeError: for bad arguments, naming what was expected, what was found and the way out; before the model is touched.

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
    cuts = cut(model, granularity, _parameters(model, parameters, include, scores), include, exclude)
    given = None if scores is None else _given(scores, cuts, granularity)
    plan = pools(cuts, sparsity, amount, scope, rounds, schedule)
    least = floors(cuts, min_keep)
    check_rounds(rounds, given, data)
    reports: list[Report] = []
    with all_or_nothing(target for target, _ in cuts.values()):
        for round_ in range(rounds):
            cuts = current(model, cuts)
            point = flow(
                wrapped, data, loss=loss, needs=() if given else measures.needs(measure), closure=closure, parameters=cuts, theta0=theta0,
                max_samples=max_samples, temperature=temperature, mode=mode, example_inputs=example_inputs, progress=progress,
            )  # fmt: skip
            found = given or evaluate(point, measure, cuts, granularity, generator)
            keeps, threshold, tied = _select(cuts, found, [(pool.names, pool.gone_after[round_]) for pool in plan], least)
            ranks.agree(keeps.values())
            reports.append(_apply(model, cuts, found, keeps, threshold, tied, point))
    report = _joined(reports)
    _warn(report)
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


def _given(scores: Mapping[Any, Tensor], cuts: Cuts, granularity: Granularity) -> Scores:
    """Scores from outside, checked: one for every unit of every parameter to prune, no nan."""
    values = {}
    for name, (target, units) in cuts.items():
        value = next((scores[key] for key in (name, *target.owners) if key in scores), None)
        if value is None:
            raise ValueError(f"scores= has no entry for {name!r}: compute scores for it too, or leave it out with exclude=")
        values[name] = _as_units(value, target.parameter, units, name)
    return Scores(values, getattr(scores, "method", "given scores"), granularity if isinstance(granularity, str) else repr(granularity))


def _as_units(value: Tensor, parameter: Tensor, units: Units, name: str) -> Tensor:
    rows = units.rows(parameter.detach())
    if value.is_meta or not (value.is_floating_point() or value.dtype in (torch.int32, torch.int64)):
        raise ValueError(f"the scores of {name!r} should be numbers with values, got {value.dtype} on {value.device}")
    laid = units.rows(value).squeeze(-1) if value.shape == parameter.shape and rows.shape[1] == 1 else value
    if laid.shape != rows.shape[:1]:
        raise ValueError(f"the scores of {name!r} have shape {tuple(value.shape)}: expected one a unit, ({len(rows)},)")
    if laid.isnan().any():
        raise ValueError(f"the scores of {name!r} hold nan: no order can be told")
    return laid.detach().to(parameter.device)


def _select(cuts: Cuts, scores: Scores, pools: Sequence[tuple[tuple[str, ...], int]], least: dict[str, int] | None) -> tuple[Keeps, float | None, int]:
    """One flag a unit for every parameter, the threshold, and how many units that stay tie with it."""
    keeps: Keeps = {}
    made: list[Cut] = []
    for names, gone_after in pools:
        blocks = cuts[names[0]][1]
        if isinstance(blocks, Blocks):
            keeps |= {name: _keep_in_blocks(blocks, scores[name], alive_units(cuts, name)) for name in names}
            continue
        values, alive = [scores[name] for name in names], [alive_units(cuts, name) for name in names]
        k = gone_after - sum(map(torch.numel, values)) + sum(numbers(lefts({name: cuts[name] for name in names})))
        made.append(lowest(values, k, alive) if least is None else with_floors(values, k, [least[name] for name in names], alive))
        keeps |= dict(zip(names, made[-1].keep, strict=True))
    return keeps, max((cut.threshold for cut in made if cut.threshold is not None), default=None), sum(cut.tied for cut in made)


def _keep_in_blocks(blocks: Blocks, scores: Tensor, left: Tensor | None) -> Tensor:
    shaped = None if left is None else left.view(-1, blocks.m)
    return lowest_in_blocks(scores.view(-1, blocks.m), blocks.m - blocks.n, shaped).flatten()


def _apply(model: nn.Module, cuts: Cuts, scores: Scores, keeps: Keeps, threshold: float | None, tied: int, point: Flow) -> Report:
    """Put the masks on, and say what they did; a parameter that keeps everything gets none."""
    before = numbers(lefts(cuts))
    after = numbers([torch.count_nonzero(keep) for keep in keeps.values()])
    changed = {name for name, was, now in zip(keeps, before, after, strict=True) if now < was}
    loss, norm = _predicted(point.g, -1, changed, cuts, keeps, point), _predicted(point.Hg, -2, changed, cuts, keeps, point)
    apply_masks(model, {name: cuts[name][1].mask(keeps[name], cuts[name][0].parameter.shape) for name in keeps if name in changed})
    now = current(model, cuts)
    kept = numbers([target.parameter.numel() if target.mask is None else torch.count_nonzero(target.mask) for target, _ in now.values()])
    layers = tuple(
        _layer(name, target, len(keeps[name]), left, was - left, weights)
        for (name, (target, _)), was, left, weights in zip(now.items(), before, after, kept, strict=True)
    )
    return Report(scores.method, scores.granularity, layers, threshold, tied, point.loss, point.samples, loss, norm)


def _layer(name: str, target: Target, units: int, left: int, newly: int, weights: int) -> Layer:
    size = target.parameter.numel()
    return Layer(name, tuple(target.parameter.shape), units, units - left, newly, size, size - weights)


def _predicted(derivative: dict[str, Tensor] | None, factor: int, changed: set[str], cuts: Cuts, keeps: Keeps, point: Flow) -> float | None:
    """factor · Σ θ·derivative over what goes: the first-order change of the loss (g, −1) or of ‖g‖² (Hg, −2)."""
    if derivative is None:
        return None
    total = 0.0
    for name in changed:
        target, units = cuts[name]
        gone = ~units.mask(keeps[name], target.parameter.shape)
        total += torch.where(gone, point.theta[name] * derivative[name], 0).sum(dtype=torch.float64).item()
    return factor * total


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
        text = f"{report.tied:,} units that stay have exactly the score of the last that went, {report.threshold:.3g}: model order decided, not the measure"
        zero = "; a zero-initialised branch or head gives its layers no gradient: train a little first, or pass exclude=" if report.threshold == 0 else ""
        warnings.warn(text + zero, TiedScoresWarning, stacklevel=3)
    empty = [layer.name for layer in report.layers if layer.units and layer.pruned == layer.units and layer.newly_pruned]
    if empty:
        text = f"nothing is left of {', '.join(empty)}: no signal passes there any more; min_keep= keeps some units of every layer"
        warnings.warn(text, LayerCollapseWarning, stacklevel=3)

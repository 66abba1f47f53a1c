"""The whole route, composed: candidates, flow, scores, choice, masks, report; round by round, all or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from torch_flowprune.gradients import Flow, FlowSource, flow_over
from torch_flowprune.inputs import Pair, Ranks, check_shapes, own_names, parameters_of, unwrapped
from torch_flowprune.masking import all_or_nothing, lost_zeros
from torch_flowprune.pruning.reports import Report, warn_of_collapse, warn_of_lost_zeros, warn_of_ties
from torch_flowprune.pruning.single_round import joined, prune_once, renewed, with_spent
from torch_flowprune.pruning.trial import trial_of
from torch_flowprune.scoring import (
    Candidates,
    Measure,
    PrunableUnits,
    Scores,
    given,
    measure_lookup,
    on_access,
    ranks_of,
    targets_of,
)
from torch_flowprune.selection import Allocation, Goal, choose, counted

GivenScores: TypeAlias = Scores | Mapping[str, Tensor] | Mapping[Pair, Tensor]


def prune(
    model: nn.Module,
    measure: Measure,
    source: FlowSource,
    units: PrunableUnits,
    goal: Goal,
    allocation: Allocation,
    scores: GivenScores | None = None,
    generator: torch.Generator | None = None,
    found: Candidates | None = None,
) -> Report:
    """Prune a model in place, by a measure over a flow or by scores at hand; ``found`` are the units, where known."""
    wrapped, model, ranks = model, unwrapped(model), Ranks.of(model)
    check_shapes(parameters_of(model).values())  # a report says the fraction of all weights
    found = scored_units(model, units, scores).of(model, source, shards=True) if found is None else found
    holders = ranks_of(found)
    with holders.together():
        fixed = None if scores is None else given(scores, found, units.granularity)
    plan = allocation.plan(found, goal, measure_lookup.name_of(measure) if fixed is None else fixed.method)
    goal.check_rounds(source.data, scored=scores is not None)
    reports: list[Report] = []
    with all_or_nothing(targets_of(found).values()):
        for round_ in range(goal.rounds):
            found = renewed(model, found) if round_ else found
            point = flow_over(source, wrapped, () if fixed else measure_lookup.needs(measure), targets_of(found))
            current = fixed or on_access(point, measure, found, units.granularity, generator)
            choice = choose(found, current, plan, round_)
            if not ranks.alone:
                ranks.agree(choice.keeps.values())
                choice = replace(choice, kept=counted(found, choice.keeps))
            reports.append(prune_once(model, found, current, choice, point))
        report = with_spent(joined(reports), plan, model, found)
        # inside: where warnings are errors, they leave the model as it was
        with holders.together():
            warn_of_ties(reports, stacklevel=4)
            warn_of_collapse(report, stacklevel=4)
            # of shards the zeros are in the values, and a trial run would be every rank's
            if all(one.shard is None for one in found.values()):
                run = trial_of(model, source)
                warn_of_lost_zeros(lost_zeros(model, parameters_of(model), run, source.data), stacklevel=4)
    return report


def prune_to(
    model: nn.Module, found: Candidates, scores: Scores, sparsity: float | None, point: Flow, allocation: Allocation
) -> Report:
    """One round with candidates and scores at hand; what it would warn of is in the report."""
    plan = allocation.plan(found, Goal(sparsity), scores.method)
    report = prune_once(model, found, scores, choose(found, scores, plan, 0), point)
    return with_spent(report, plan, model, found)


def scored_units(model: nn.Module, units: PrunableUnits, scores: Mapping[Any, Tensor] | None) -> PrunableUnits:
    """With scores given and no other choice made, those that have scores."""
    if scores is None or units.are_read:
        return units
    pairs = _scored_pairs(model, scores)
    return units if units.parameters is not None or units.include is not None else replace(units, parameters=pairs)


def _scored_pairs(model: nn.Module, scores: Mapping[Any, Tensor]) -> Iterable[Pair]:
    """The pairs that scores are of, each of a parameter of this model."""
    if not isinstance(scores, Mapping):
        raise TypeError(
            f"scores= should be tensors by parameter name, as fp.scores returns them, got {type(scores).__name__}"
        )
    if not scores:
        raise ValueError("scores= is empty: expected scores by parameter name, as fp.scores returns them")
    known = parameters_of(model)
    names = own_names(known, [key for key in scores if isinstance(key, str)])
    if unknown := [key for key, name in names.items() if name not in known]:
        raise ValueError(f"scores= has entries for parameters this model does not have: {', '.join(unknown[:5])}")
    return [known[names[key]].owners[0] if isinstance(key, str) else key for key in scores]

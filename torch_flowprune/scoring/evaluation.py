"""A measure over the units of a flow: stored, or computed where it is read."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_flowprune.gradients import Flow
from torch_flowprune.inputs import cpu_generator
from torch_flowprune.scoring import measures
from torch_flowprune.scoring.candidates import Candidates, label
from torch_flowprune.scoring.granularity import Granularity
from torch_flowprune.scoring.measures import Measure
from torch_flowprune.scoring.stacked_scores import Computed, not_finite
from torch_flowprune.scoring.unit_scores import Scores


def evaluate(
    point: Flow, measure: Measure, found: Candidates, granularity: Granularity, generator: torch.Generator | None = None
) -> Scores:
    """One measure over every candidate of a flow; every score is finite."""
    needed, ours = measures.needs(measure), measure in measures.MEASURES.values()
    values = {}
    with cpu_generator(generator) as source:
        for name, candidate in found.items():
            arguments = {
                kind: source if kind == "generator" else _handed_out(candidate.rows(point.tensors(kind)), shared=ours)
                for kind in needed
            }
            values[name] = _checked(measure(**arguments), len(candidate), measure, name)
    _all_finite(values, measure)
    return Scores(values, measures.name_of(measure), label(granularity))


def _handed_out(rows: Tensor, *, shared: bool) -> Tensor:
    """Copied for a function of a user, who may write in place: θ shares its storage with the model."""
    return rows if shared else rows.clone()


def on_access(
    point: Flow, measure: Measure, found: Candidates, granularity: Granularity, generator: torch.Generator | None = None
) -> Scores:
    """As :func:`evaluate`, but computed where they are read: a selection stores nothing, and checks for nan.

    Only what scores each unit by itself can be read in parts. This package's measures do, but for random numbers; a
    function of yours may look at whole layers, so its scores are stored.
    """
    needed, label_ = measures.needs(measure), measures.name_of(measure)
    if measure not in measures.MEASURES.values() or "generator" in needed:
        return evaluate(point, measure, found, granularity, generator)
    values = {
        name: Computed(name, label_, measure, needed, lambda kind, one=candidate: one.rows(point.tensors(kind)))  # type: ignore[misc]
        for name, candidate in found.items()
    }
    return Scores(values, label_, label(granularity))


def _checked(value: Tensor, units: int, measure: Measure, name: str) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != (units,):
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"the measure {measures.name_of(measure)!r} gave {found} for {name!r}: expected one score a unit, shape "
            f"({units},); reduce the last axis"
        )
    return value


def _all_finite(values: dict[str, Tensor], measure: Measure) -> None:
    """Checked together, with one synchronisation a device."""
    bad = [name for name, finite in zip(values, _finite(values), strict=True) if not finite]
    if bad:
        raise not_finite(measures.name_of(measure), bad)


def _finite(values: dict[str, Tensor]) -> list[bool]:
    """From the extremes, which nan and inf show in: one read of the scores."""
    extremes = [torch.stack(value.aminmax()) if value.numel() else value.new_zeros(2) for value in values.values()]
    by_device = {
        device: iter(
            torch.stack([pair.double() for pair in extremes if pair.device == device]).isfinite().all(-1).tolist()
        )
        for device in {pair.device for pair in extremes}
    }
    return [next(by_device[pair.device]) for pair in extremes]

"""A measure over the units of a flow: stored, or computed where it is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from torch_flowprune.gradients import MOMENTS, Flow
from torch_flowprune.inputs import cpu_generator
from torch_flowprune.scoring import measure_lookup, measures
from torch_flowprune.scoring.candidates import Candidate, Candidates, label, ranks_of
from torch_flowprune.scoring.granularity import Granularity
from torch_flowprune.scoring.measures import Measure
from torch_flowprune.scoring.stacked import Computed, DrawnScores, LayerScores, as_given, not_finite
from torch_flowprune.scoring.unit_scores import Scores


def evaluate(
    point: Flow, measure: Measure, found: Candidates, granularity: Granularity, generator: torch.Generator | None = None
) -> Scores:
    """One measure over every candidate of a flow; every score is finite."""
    tensors, ours = _tensors_of(point, measure, found), measure in measures.MEASURES.values()
    values, source, asked = {}, _agreed_generator(generator, found), measure_lookup.asks(measure)
    ranks = ranks_of(found)
    for name, candidate in found.items():
        given = {"generator": source, "name": name, "shape": candidate.shape}
        if ours and "generator" in asked and candidate.shard is not None:
            values[name] = _drawn_together(measure, candidate, source)
            continue
        rows = candidate.rows if ours else candidate.all_rows  # a function of a user may look at whole layers
        arguments = {
            kind: given[kind] if kind in given else _handed_out(rows(tensors[kind]), shared=ours) for kind in asked
        }
        with ranks.together():
            values[name] = _checked(measure(**arguments), candidate, measure, whole=not ours)
        if not ours and candidate.shard is not None:
            values[name] = candidate.shard.part(candidate.shard.ranks.agreed(values[name])).clone()
    _check_extremes({name: _extremes(value) for name, value in values.items()}, measure_lookup.name_of(measure), found)
    return Scores(values, measure_lookup.name_of(measure), label(granularity))


def _agreed_generator(generator: torch.Generator | None, found: Candidates) -> torch.Generator:
    """On ranks that hold parts of one model, each at the point where the first one's is."""
    source, ranks = cpu_generator(generator), ranks_of(found)
    if not ranks.alone:
        source.set_state(ranks.agreed(source.get_state()))
    return source


def _drawn_together(measure: Measure, one: Candidate, source: torch.Generator) -> Tensor:
    """Those of a whole layer, as one process draws them, of which the rank takes its own."""
    assert one.shard is not None
    theta = torch.zeros((), device=one.targets[0].parameter.device).expand(len(one), 1)
    return one.shard.part(measure(theta=theta, generator=source)).clone()


def _handed_out(rows: Tensor, *, shared: bool) -> Tensor:
    """Copied for a function of a user, who may write in place: θ shares its storage with the model."""
    return rows if shared else rows.clone()


def on_access(
    point: Flow, measure: Measure, found: Candidates, granularity: Granularity, generator: torch.Generator | None = None
) -> Scores:
    """As :func:`evaluate`, but computed where they are read: a selection stores nothing, and checks for nan.

    Only what scores each unit by itself can be read in parts. This package's measures do; a function of yours may look
    at whole layers, so its scores are stored.
    """
    needed, label_ = measure_lookup.needs(measure), measure_lookup.name_of(measure)
    if measure not in measures.MEASURES.values():
        return evaluate(point, measure, found, granularity, generator)
    if "generator" in needed:
        return _drawn(measure, found, granularity, generator)
    if any(one.moves for one in found.values()):
        return evaluate(point, measure, found, granularity, generator)
    tensors = _tensors_of(point, measure, found)
    values = {
        name: Computed(name, label_, measure, needed, lambda kind, one=candidate: one.rows(tensors[kind]))  # type: ignore[misc]
        for name, candidate in found.items()
    }
    return Scores(values, label_, label(granularity))


def _drawn(measure: Measure, found: Candidates, granularity: Granularity, generator: torch.Generator | None) -> Scores:
    label_, values = measure_lookup.name_of(measure), dict[str, LayerScores]()
    source = _agreed_generator(generator, found)
    for name, one in found.items():
        if one.shard is not None:
            values[name] = _drawn_together(measure, one, source)
            continue
        scores = DrawnScores(measure, len(one), one.targets[0].parameter.device, source)
        values[name] = Computed(name, label_, as_given, ("scores",), lambda _, drawn=scores: drawn)  # type: ignore[misc]
    return Scores(values, label_, label(granularity))


def all_stored(
    found: Candidates, scores: Scores, made: Callable[[str, Tensor], Tensor] = lambda _name, value: value
) -> dict[str, Tensor]:
    """Every score, or what is ``made`` of a layer's, to be read more than once; what is computed for it is finite."""
    values, extremes = {}, {}
    for name, value in scores.items():
        if isinstance(scores.stored(name), Computed):
            extremes[name] = _extremes(value)
        values[name] = made(name, value)
    _check_extremes(extremes, scores.method, found)
    return values


def _tensors_of(point: Flow, measure: Measure, found: Candidates) -> dict[str, Mapping[str, Tensor]]:
    """What a measure reads, taken once: each time, the flow looks at where all of its tensors are."""
    tensors = {kind: point.tensors(kind) for kind in measure_lookup.needs(measure) if kind != "generator"}
    read = dict.fromkeys(name for one in found.values() for name in one.read)
    for kind in tensors.keys() & MOMENTS.keys():
        if missing := [name for name in read if name not in tensors[kind]]:
            raise ValueError(
                f"{kind} of {', '.join(missing[:5])}: on this data the model uses them in no product or convolution "
                "of its own, so the inputs that they multiply are unknown; leave them out with exclude=, or use "
                "another measure"
            )
    return tensors


def _checked(value: Tensor, one: Candidate, measure: Measure, *, whole: bool) -> Tensor:
    units = len(one) if whole or one.shard is None else len(one.shard)
    if not isinstance(value, Tensor) or value.shape != (units,):
        form = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"the measure {measure_lookup.name_of(measure)!r} gave {form} for {one.name!r}: expected a score per "
            f"unit, shape ({units},); reduce the last axis"
        )
    return value


def _check_extremes(extremes: dict[str, Tensor], measure: str, found: Candidates) -> None:
    """Checked together, with one synchronisation a device; an error on every rank where it is one on some."""
    odd = ranks_of(found).add_up([int(not finite) for finite in _finite(list(extremes.values()))])
    bad = [name for name, count in zip(extremes, odd, strict=True) if count]
    if bad:
        raise not_finite(measure, bad)


def _extremes(values: Tensor) -> Tensor:
    """The lowest and the highest, which nan and inf show in: one read of the scores."""
    return torch.stack(values.aminmax()) if values.numel() else values.new_zeros(2)


def _finite(extremes: Sequence[Tensor]) -> list[bool]:
    by_device = {
        device: iter(
            torch.stack([pair.double() for pair in extremes if pair.device == device]).isfinite().all(-1).tolist()
        )
        for device in {pair.device for pair in extremes}
    }
    return [next(by_device[pair.device]) for pair in extremes]

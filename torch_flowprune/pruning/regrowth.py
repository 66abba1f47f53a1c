"""Weights that come back: what dynamic sparse training grows where it has pruned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Never

from torch_flowprune.gradients import FlowSource, flow_over
from torch_flowprune.inputs import Closure, Loss, Ranks, Target, check_keywords, own_names, parameters_of, unwrapped
from torch_flowprune.masking import all_or_nothing, apply_masks, check_can_mask, zero_grown
from torch_flowprune.scoring import (
    Candidates,
    Measure,
    PrunableUnits,
    evaluate,
    lefts,
    masks_of,
    measure_lookup,
    measures,
)
from torch_flowprune.selection import lowest, to_prune


def _gradient_size(g: Tensor) -> Tensor:
    """|g|, the slope of the loss along a weight that is 0 now: what RigL grows by (Evci et al., ICML 2020)."""
    return g.abs().sum(-1)


_WORDS: dict[str, Measure] = {"gradient": _gradient_size, "random": measures.random}


def regrow(
    model: nn.Module,
    fraction: float | Mapping[str, float],
    by: str | Measure = "gradient",
    data: object = None,
    *,
    optimizer: Any = None,
    loss: Loss | None = None,
    closure: Closure | None = None,
    max_samples: int | None = None,
    mode: str = "eval",
    generator: torch.Generator | None = None,
    **unknown: Never,
) -> dict[str, int]:
    """Unmask pruned weights, exactly as many as requested, each with the value 0.

    This is the growth step of dynamic sparse training, after weights were dropped: by the gradient that the weights
    would have (RigL), or at random (SET). In each layer, the weights with the highest values come back; ties are broken
    in order. Filters come back with ``fp.apply_masks(model, masks, replace=True)``.

    Args:
        model: a model with masks on single weights; all layers are changed, or none. With a sharded model, make the
            same call on every rank.
        fraction: how many of each layer's pruned weights come back: a fraction (float) or a number (int), or either by
            parameter name.
        by: ``"gradient"``, ``"random"``, or a function like a measure (``lambda g: ...``), whose highest values come
            back. It gets one row per weight: ``g``, ``Hg`` and others from ``fp.flow(under_masks=True)``, and
            ``theta``, which is 0 for pruned weights.
        data: the batches that the gradient is computed on, see :func:`~torch_flowprune.flow`.
        loss, closure: ``loss(output, target)``, or instead ``closure(model, batch)`` that returns the loss, see
            :func:`~torch_flowprune.flow`.
        max_samples: read exactly this many samples, see :func:`~torch_flowprune.flow`.
        mode: batch norm and dropout meanwhile, ``"eval"`` or ``"train"``, see :func:`~torch_flowprune.flow`.
        optimizer: one or several optimizers of the model: their state (momentum, squares) of regrown weights is set to
            0.
        generator: the random generator for ``"random"``.
        unknown: no other keyword is accepted; the error names the one meant.

    Returns:
        How many weights came back, by parameter name.

    Raises:
        ValueError, TypeError: for bad arguments, a model that is not pruned, more weights than are pruned, or scores
            that are not finite. The model is then as it was.

    See Also:
        :class:`~torch_flowprune.Pruner`: prunes in rounds.

    >>> import torch, torch_flowprune as fp
    >>> layer, batch = torch.nn.Linear(8, 4), (torch.randn(16, 8), torch.randint(4, (16,)))
    >>> report = fp.global_prune(layer, "magnitude", sparsity=0.75)
    >>> fp.regrow(layer, 0.25, by="gradient", data=batch)
    {'weight': 6}
    """
    check_keywords(regrow, unknown)
    source = FlowSource(data, loss, closure, max_samples=max_samples, mode=mode, under_masks=True)
    measure = _WORDS[by] if isinstance(by, str) and by in _WORDS else measure_lookup.resolve(by)
    optimizers = _optimizers(optimizer)
    inner = unwrapped(model)
    pruned, amounts = _amounts(parameters_of(inner), fraction)
    units = PrunableUnits(parameters=[target.owners[0] for target in pruned.values()])
    candidates = units.of(inner, source, shards=True)
    counts = _counts(candidates, amounts)
    grown = _highest(model, candidates, measure, source, counts, generator)
    with all_or_nothing(pruned.values()):
        left = {name: candidate.alive() for name, candidate in candidates.items()}
        flags = {name: grown[name] if alive is None else grown[name] | alive for name, alive in left.items()}
        apply_masks(inner, masks_of(candidates, flags), replace=True, copy=False)
    stays = masks_of(candidates, {name: ~flag for name, flag in grown.items()})
    for name, target in pruned.items():
        zero_grown(target.parameter, stays[name], optimizers)
    return counts


def _optimizers(given: Any) -> list[Any]:
    several = list(given) if isinstance(given, (list, tuple)) else [] if given is None else [given]
    if odd := [one for one in several if not callable(getattr(one, "step", None))]:
        raise TypeError(f"optimizer= should be an optimizer, or a list of them, got {type(odd[0]).__name__}")
    return several


def _amounts(
    known: Mapping[str, Target], fraction: float | Mapping[str, float]
) -> tuple[dict[str, Target], dict[str, float]]:
    """Which parameters grow, and by what."""
    pruned = {name: target for name, target in known.items() if target.mask is not None}
    if not pruned:
        raise ValueError("nothing can come back, as the model has no masks: prune it first")
    if isinstance(fraction, Mapping):
        names = own_names(known, fraction)
        if odd := [given for given, name in names.items() if name not in pruned]:
            raise ValueError(f"fraction= names {', '.join(odd[:5])}, and no such parameter of the model is pruned")
        asked = {names[given]: amount for given, amount in fraction.items()}
    else:
        asked = dict.fromkeys(pruned, fraction)
    return {name: check_can_mask(pruned[name], name, shards=True) for name in asked}, asked


def _counts(found: Candidates, amounts: Mapping[str, float]) -> dict[str, int]:
    """By how many weights they grow."""
    left = dict(zip(found, lefts(found), strict=True))
    return {name: _count(amount, len(found[name]) - left[name], name) for name, amount in amounts.items()}


def _count(amount: float, gone: int, name: str) -> int:
    try:
        return to_prune(amount, gone)
    except ValueError as error:
        raise ValueError(
            f"of the {gone} weights of {name!r} that are pruned {amount!r} cannot come back: expected a fraction from "
            "0 to 1 (float), or a number of them (int)"
        ) from error


def _highest(
    model: nn.Module,
    found: Candidates,
    measure: Measure,
    source: FlowSource,
    counts: Mapping[str, int],
    generator: torch.Generator | None,
) -> dict[str, Tensor]:
    """Which weights grow: of those that are pruned the highest, on all ranks the same."""
    point = flow_over(source, model, measure_lookup.needs(measure), list(counts))
    scores = evaluate(point, measure, found, "weight", generator)
    grown = {}
    for name, count in counts.items():
        alive = found[name].alive()
        assert alive is not None
        (stays,) = lowest([-scores[name]], count, [~alive], [found[name].shard]).keep
        grown[name] = ~alive & ~stays
    ranks = Ranks.of(model)
    if not ranks.alone:
        ranks.agree(grown.values())
    return grown

"""Scores of a model: any number of measures from one flow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn
from typing_extensions import Never, Unpack

from torch_flowprune.channels import Coupling
from torch_flowprune.gradients import FlowOptions, FlowSource, Reduction, flow_over
from torch_flowprune.inputs import (
    BatchDim,
    BatchSize,
    Closure,
    Loss,
    Pair,
    Pattern,
    check_keywords,
    parameters_of,
    shards_of,
    unwrapped,
)
from torch_flowprune.scoring import measure_lookup
from torch_flowprune.scoring.candidates import Candidates, ShardUnits, targets_of
from torch_flowprune.scoring.evaluation import evaluate
from torch_flowprune.scoring.granularity import Granularity
from torch_flowprune.scoring.measures import Measure
from torch_flowprune.scoring.prunable_units import PrunableUnits, UnitOptions
from torch_flowprune.scoring.unit_scores import Scores


class ScoreOptions(FlowOptions, UnitOptions, total=False):
    """What :func:`scores` takes besides model, measures and data."""

    generator: torch.Generator | None


@overload
def scores(  # type: ignore[overload-overlap]  # a str is a sequence of strs
    model: nn.Module, method: str | Measure = "magnitude", data: object = None, **options: Unpack[ScoreOptions]
) -> Scores: ...
@overload
def scores(
    model: nn.Module, method: Sequence[str | Measure], data: object = None, **options: Unpack[ScoreOptions]
) -> dict[str, Scores]: ...
def scores(
    model: nn.Module,
    method: str | Measure | Sequence[str | Measure] = "magnitude",
    data: object = None,
    *,
    granularity: Granularity = "weight",
    parameters: Iterable[Pair] | None = None,
    include: Pattern | Sequence[Pattern] | None = None,
    exclude: Pattern | Sequence[Pattern] | None = None,
    loss: Loss | None = None,
    closure: Closure | None = None,
    theta0: Mapping[str, Tensor] | None = None,
    max_samples: int | None = None,
    temperature: float = 1.0,
    mode: str = "eval",
    example_inputs: Any = None,
    scored_by: str = "producer",
    coupling: Coupling | None = None,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
    max_memory: int | str | None = None,
    offload: bool = False,
    autocast: torch.dtype | None = None,
    batch_size: BatchSize | None = None,
    batch_dim: BatchDim = 0,
    reduction: Reduction | None = None,
    check: bool | None = None,
    probes: int = 32,
    **unknown: Never,
) -> Scores | dict[str, Scores]:
    """What removing each unit costs, by parameter name; the lowest would be pruned. The model is left as it was.

    Args:
        model: any module. With a sharded model, make the same call on every rank; scores of single weights are then
            ``DTensor`` in the parameter's shape and placements, see :doc:`/guide/sharded_models`.
        method: a measure's name, a function of rows, or a list of them. A list is scored from one flow, and the result
            is a dict by name.
        granularity: ``"weight"``, ``"filter"``, ``"n:m"``, ``"channel"`` or ``"block"``; scores then have the names of
            the coupled groups, or of the residual branches.
        parameters, include, exclude: which parameters: ``(module, name)`` pairs, or name globs, module types or modules
            to prune or to leave out, see :func:`~torch_flowprune.inputs.prunable`.
        data: the batches to score on: an iterable of ``(input, target)`` or dict batches, or one batch;
            ``magnitude``, ``l1`` and ``random`` need none, see :func:`~torch_flowprune.flow`.
        loss: ``loss(output, target)``; by default cross-entropy, or the model's own loss for dict batches, see
            :func:`~torch_flowprune.flow`.
        closure: instead of ``loss``, ``closure(model, batch)`` that returns the loss, see
            :func:`~torch_flowprune.flow`.
        theta0: a state dict of the reference point, for measures that read it, see :func:`~torch_flowprune.flow`.
        max_samples: read exactly this many samples, see :func:`~torch_flowprune.flow`.
        temperature: the output is divided by it before the loss, see :func:`~torch_flowprune.flow`.
        mode: batch norm and dropout while scoring, ``"eval"`` or ``"train"``, see :func:`~torch_flowprune.flow`.
        progress, max_memory, offload, autocast: a progress bar, a memory limit such as ``"2GB"``, sums kept on the
            host, and mixed precision, see :func:`~torch_flowprune.flow`.
        batch_size, batch_dim, reduction: how many samples a batch has, along which axis, and how the loss reduces it,
            where the batches do not show it, see :func:`~torch_flowprune.flow`.
        check, probes: whether H·g is checked, and how many random probes ``obd`` takes, see
            :func:`~torch_flowprune.flow`.
        example_inputs: inputs that show the shapes that ``synflow`` and channels need, if no ``data`` is given.
        scored_by: for channels: ``"producer"`` (the paper's), ``"group"``, ``"norm"`` or ``"scale"``, see
            :func:`~torch_flowprune.scoring.candidates.group_units.channel_candidates`.
        coupling: for channels and blocks, the result of :func:`~torch_flowprune.couple`, or a coupling written by hand:
            the model is then not read again, and needs no ``example_inputs``.
        generator: the random generator for ``random``; if left out, torch's global generator, which then advances.
        unknown: no other keyword is accepted; the error names the one meant.

    Raises:
        ValueError, TypeError: for anything unknown, missing or not finite; the message names it.

    See Also:
        :func:`~torch_flowprune.compare`: measures side by side.
        :func:`~torch_flowprune.flow`: the derivatives that the scores are computed from.
        :func:`~torch_flowprune.global_prune`: prunes by scores, with ``scores=``.

    >>> import torch, torch_flowprune as fp
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))
    >>> fp.scores(model, "magnitude")["0.weight"].shape
    torch.Size([6])
    """
    check_keywords(scores, unknown)
    source = FlowSource(
        data,
        loss,
        closure,
        theta0,
        max_samples,
        temperature,
        mode,
        example_inputs,
        progress,
        max_memory,
        offload,
        autocast,
        batch_size,
        batch_dim,
        reduction,
        check,
        probes,
    )
    units = PrunableUnits(granularity, parameters, include, exclude, scored_by, coupling)
    wrapped, model = model, unwrapped(model)
    methods = [method] if isinstance(method, str) or callable(method) else list(method)
    resolved = measure_lookup.measures_by_name(methods)
    chosen = units.of(model, source, shards=True)
    needs = {kind for measure in resolved.values() for kind in measure_lookup.needs(measure)}
    point = flow_over(source, wrapped, tuple(needs), targets_of(chosen))
    found = {
        name: _for_users(evaluate(point, measure, chosen, granularity, generator), chosen)
        for name, measure in resolved.items()
    }
    return next(iter(found.values())) if isinstance(method, str) or callable(method) else found


def _for_users(scores: Scores, found: Candidates) -> Scores:
    """What a rank has scored of shards, as ``DTensor``, or put together where it is small."""
    values = {
        name: one.handed_out(scores[name]) if isinstance(one, ShardUnits) else scores.stored(name)
        for name, one in found.items()
    }
    return Scores(values, scores.method, scores.granularity)


def importance_scores(
    model: nn.Module, method: str | Measure = "magnitude", data: object = None, **options: Unpack[ScoreOptions]
) -> dict[Pair, Tensor]:
    """Scores of single weights by ``(module, name)``, for ``prune.global_unstructured``.

    Pass them to ``prune.global_unstructured`` with one of this package's classes: torch's ``L1Unstructured`` would
    prune by their absolute value.

    Args:
        model: any module; left as it was.
        method: a measure's name or a function of rows.
        data: the batches to score on, as :func:`~torch_flowprune.scores` takes them.
        options: keywords of :func:`~torch_flowprune.scores`: what is differentiated (``loss``, ``closure``, ...), and
            which parameters are scored (``include``, ``exclude``, ...).

    Returns:
        A dict from ``(module, name)`` to a tensor of the parameter's shape.

    Raises:
        ValueError, TypeError: as :func:`~torch_flowprune.scores` does, and for several measures, another granularity
            or a sharded model.

    See Also:
        :func:`~torch_flowprune.scores`: scores of any units, by parameter name.

    >>> import torch, torch_flowprune as fp
    >>> model = torch.nn.Linear(3, 2)
    >>> fp.importance_scores(model)[(model, "weight")].shape
    torch.Size([2, 3])
    """
    check_keywords(importance_scores, options, ScoreOptions)
    if shards_of(unwrapped(model)):
        raise ValueError(
            "prune.global_unstructured takes whole parameters, and this model is sharded: fp.scores and "
            "fp.global_prune(scores=) take shards"
        )
    if not isinstance(method, str) and isinstance(method, Sequence):
        raise TypeError(f"importance_scores takes one measure, got {list(method)!r}: call it once for each")
    if options.get("granularity", "weight") != "weight":
        raise ValueError("prune.global_unstructured prunes single weights: leave granularity= out")
    if options.get("parameters") is not None:
        options["parameters"] = list(options["parameters"] or ())
    scores_by_name = scores(model, method, data, **options)
    known = parameters_of(unwrapped(model))
    return {known[name].owners[0]: score.view(known[name].parameter.shape) for name, score in scores_by_name.items()}

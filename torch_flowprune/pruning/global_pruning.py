"""The route in one call: ``global_prune``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Never

from torch_flowprune.channels import Coupling, LatencyTable
from torch_flowprune.gradients import FlowSource, Reduction
from torch_flowprune.inputs import BatchDim, BatchSize, Closure, Loss, Pair, Pattern, check_keywords
from torch_flowprune.pruning.reports import Report
from torch_flowprune.pruning.route import GivenScores, prune
from torch_flowprune.scoring import Granularity, Measure, PrunableUnits, Scores, measure_lookup
from torch_flowprune.selection import Allocation, AtMost, Goal, PerLayer, Schedule, SharedOut


def global_prune(
    model: nn.Module,
    method: str | Measure = "magnitude",
    sparsity: float | None = None,
    *,
    amount: float | None = None,
    granularity: Granularity | None = None,
    allocation: SharedOut | None = None,
    scope: str = "global",
    normalize: str | None = "default",
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
    min_keep: PerLayer | None = None,
    max_sparsity: PerLayer | None = None,
    rounds: int | None = None,
    schedule: str | Schedule | Sequence[float] = "exponential",
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
    scores: GivenScores | None = None,
    example_inputs: Any = None,
    scored_by: str = "producer",
    coupling: Coupling | None = None,
    cost: str | LatencyTable = "units",
    at_most: AtMost | None = None,
    round_to: int = 1,
    **unknown: Never,
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
        allocation: how sparsity is shared out over the layers, see :doc:`/guide/allocation`: ``"global"``, one ranking
            over all of them; ``"layer"``, every layer to the same sparsity; ``"row"``, every output of every layer;
            ``"isomorphic"``, one ranking for each kind of layer; ``"er"`` and ``"erk"``, by the layers' shapes;
            ``"lamp"``, one ranking of scores relative to those above them in their layer; a mapping of name globs to
            sparsities; or a function of ``(layers, sparsity)``.
        scope: a shorter name for the first three.
        normalize: what a layer's scores are divided by before layers are ranked together: their ``"mean"``, ``"max"``
            or ``"l2"`` norm; ``"lamp"`` divides a score's square by the sum of those not lower. None ranks them as
            they are, as the paper does. By default ``magnitude`` and ``l1`` rank channels over their layer's mean and
            filters by LAMP; all else is ranked as it is.
        data, loss, closure, theta0, max_samples, temperature, mode, progress, max_memory, offload, autocast: what the
            scores are taken over, and with what, see :func:`~torch_flowprune.flow`.
        batch_size, batch_dim, reduction, check, probes: how batches are counted and weighed, whether H·g is checked,
            and how many random probes ``obd`` takes, see :func:`~torch_flowprune.flow`.
        unknown: none; a word of another library is answered with the one meant.
        parameters, include, exclude: which parameters, see :func:`~torch_flowprune.inputs.prunable`.
        min_keep: how many units every layer keeps at least: a number (int), a fraction of the layer (float), or a
            mapping of name globs to these. One, for filters and channels, unless 0 is given.
        max_sparsity: the largest share of a layer that may be gone: a number, or a mapping of name globs to numbers.
        rounds: prune in this many steps, one if left out, scoring anew before each.
        schedule: the sparsity after each round: ``"exponential"``, ``"linear"``, ``"cubic"``, ``"paper"``, a function
            of ``(rounds, start, target)``, or the sparsities themselves, ``[0.5, 0.75, 0.9]``.
        generator: the source of randomness for ``random``; torch's global one if left out, which goes on.
        scores: scores computed earlier, by parameter name or ``(module, name)``: no sweep is made, and no ``method`` is
            needed.
        example_inputs: inputs that show the shapes that ``synflow`` and channels need, where there is no data.
        scored_by: for channels, which of the coupled slices a measure reads: ``"producer"``, ``"consumer"``,
            ``"group"``, ``"norm"`` or ``"scale"``.
        coupling: for channels, what :func:`~torch_flowprune.couple` gives, or written by hand: the model is not read
            again, and needs no ``example_inputs``.
        cost: what ``sparsity`` and ``amount`` are shares of: ``"units"``, or for channels the ``"parameters"``,
            ``"flops"``, ``"memory"`` or ``"latency"`` of the whole model, see :doc:`/guide/allocation`; a
            :class:`LatencyTable` keeps what was measured. The units of lowest score then go, as few as bring what
            ``shrink`` leaves down to the target; every group keeps one.
        at_most: for channels, what the model may cost in the end, whatever its share: ``{"latency": 12.5}``
            (milliseconds), ``{"memory": 50e6}`` (bytes), ``{"flops": 1e9, "parameters": 2e6}`` (both are met). Beside
            ``sparsity`` all targets are met, and ``cost`` says what ``sparsity`` is of.
        round_to: for filters and channels, what the number that a layer keeps is a multiple of (8 for tensor cores).
            The count is then met as nearly as the multiple allows.

    Returns:
        What was removed, where, and what it was predicted to cost.

    Raises:
        ValueError, TypeError: for bad arguments, naming what was expected, what was found and the way out; before the
        model is touched.

    Warns:
        LayerCollapseWarning: if a layer lost its last unit.
        TiedScoresWarning: if the order of the layers decided more than the scores did.

    See Also:
        :class:`~torch_flowprune.Pruner`: the same in a training loop, round by round.
        :func:`~torch_flowprune.compare`: which measure to take.
        :func:`~torch_flowprune.shrink`: to remove pruned channels physically.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> report = global_prune(model, "magnitude", sparsity=0.5)
    >>> report.pruned, report.units
    (40, 80)
    """
    check_keywords(global_prune, unknown)
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
    own = scores.granularity if isinstance(scores, Scores) else "weight"
    units = PrunableUnits(granularity or own, parameters, include, exclude, scored_by, coupling)
    goal = Goal.asked(sparsity, amount, rounds, schedule)
    shared_out = Allocation(allocation, scope, normalize, min_keep, max_sparsity, round_to, cost, at_most)
    shared_out.check_beside(goal.sparsity, goal.amount)
    return prune(model, measure_lookup.resolve(method), source, units, goal, shared_out, scores, generator)

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
    uniform: bool = False,
    **unknown: Never,
) -> Report:
    """Prune the units with the lowest scores over the whole model, in place.

    After the call, exactly ``round(sparsity · n)`` of the n prunable units are pruned, with ties broken in model order.
    Units that were pruned before stay pruned and count. An error leaves the model as it was.

    Args:
        model: any module; pruned in place. With ``DistributedDataParallel`` or a sharded model, make the same call on
            every rank; all ranks get the same masks.
        method: a measure's name (``"loss_preservation"``) or a function of rows.
        sparsity: the fraction of all prunable units that are pruned after the call, from 0 to 1; for ``"n:m"`` it
            follows from the pattern.
        amount: instead of ``sparsity``, as in torch: a fraction of the units that are left (float) or a number of units
            (int); with ``scope="layer"`` of each layer.
        granularity: what a unit is: ``"weight"`` (the default), ``"filter"``, ``"n:m"`` such as ``"2:4"``,
            ``"channel"``: coupled channels, or ``"block"``: residual branches; :func:`~torch_flowprune.shrink` can then
            remove these.
        allocation: how sparsity is distributed over the layers, see :doc:`/guide/allocation`: ``"global"``, one ranking
            over all of them; ``"layer"``, every layer to the same sparsity; ``"row"``, every output of every layer;
            ``"isomorphic"``, one ranking for each kind of layer; ``"er"`` and ``"erk"``, by the layers' shapes;
            ``"lamp"``, one ranking of scores relative to those above them in their layer; a mapping of name globs to
            sparsities; or a function of ``(layers, sparsity)``.
        scope: a short form of ``allocation``, for its first three values.
        normalize: what a layer's scores are divided by before layers are ranked together: their ``"mean"``, ``"max"``
            or ``"l2"`` norm. ``"lamp"`` divides a score's square by the sum of the squares that are not lower. None
            ranks raw scores, as the paper does. By default ``magnitude`` and ``l1`` divide scores of channels by their
            layer's mean and rank filters by LAMP; all other scores are ranked raw.
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
        parameters, include, exclude: which parameters: ``(module, name)`` pairs, or name globs, module types or modules
            to prune or to leave out, see :func:`~torch_flowprune.inputs.prunable`.
        min_keep: the least that every layer keeps: a number of units (int), a fraction of the layer (float), or a
            mapping of name globs to these. For filters and channels the default is 1; 0 allows empty layers.
            Blocks that have to stay are named.
        max_sparsity: the highest sparsity of any layer: a number, or a mapping of name globs to numbers.
        rounds: the number of steps to prune in, with new scores before each; 1 if left out.
        schedule: the sparsity after each round: ``"exponential"``, ``"linear"``, ``"cubic"``, ``"paper"``, a function
            of ``(rounds, start, target)``, or the sparsities themselves, ``[0.5, 0.75, 0.9]``.
        generator: the random generator for ``random``; if left out, torch's global generator, which then advances.
        scores: scores computed earlier, by parameter name or ``(module, name)``. No data is read, and no ``method`` is
            needed.
        example_inputs: inputs that show the shapes that ``synflow`` and channels need, if no ``data`` is given.
        scored_by: for channels, which of the coupled slices a measure reads: ``"producer"``, ``"consumer"``,
            ``"group"``, ``"norm"`` or ``"scale"``.
        coupling: for channels and blocks, the result of :func:`~torch_flowprune.couple`, or a coupling written by hand:
            the model is then not read again, and needs no ``example_inputs``.
        cost: what ``sparsity`` and ``amount`` are fractions of: ``"units"``, or for channels and blocks the
            ``"parameters"``, ``"flops"``, ``"memory"`` or ``"latency"`` of the whole model, see
            :doc:`/guide/allocation`. A :class:`LatencyTable` keeps the measured latencies. With a cost, the units of
            lowest score are pruned until the model that ``shrink`` leaves meets the target. Every group of channels
            keeps at least one.
        at_most: for channels and blocks, absolute budgets for the smaller model: ``{"latency": 12.5}`` (milliseconds),
            ``{"memory": 50e6}`` (bytes), ``{"flops": 1e9, "parameters": 2e6}`` (both are met). With ``sparsity``, all
            targets are met, and ``cost`` says what ``sparsity`` is a fraction of.
        round_to: for filters and channels, every layer keeps a multiple of this number (8 for tensor cores). The count
            is then met as nearly as the multiple allows.
        uniform: for channels, the layers of repeated blocks keep equally many, so that the shrunk model is one that its
            class can build, see :doc:`/guide/language_models`. The count is then met as nearly as such sizes allow.
        unknown: no other keyword is accepted; the error names the one meant.

    Returns:
        What was pruned, where, and the predicted change of the loss.

    Raises:
        ValueError, TypeError: for bad arguments, before the model is changed. The message says what was expected, what
            was found, and how to fix it.

    Warns:
        LayerCollapseWarning: if a layer lost its last unit.
        TiedScoresWarning: if many units tie with the last pruned one, so that model order decided.

    See Also:
        :class:`~torch_flowprune.Pruner`: the same in rounds, in a training loop.
        :func:`~torch_flowprune.compare`: which measure to use.
        :func:`~torch_flowprune.shrink`: removes the pruned channels.

    >>> import torch, torch_flowprune as fp
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> report = fp.global_prune(model, "magnitude", sparsity=0.5)
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
    shared_out = Allocation(allocation, scope, normalize, min_keep, max_sparsity, round_to, cost, at_most, uniform)
    shared_out.check_beside(goal.sparsity, goal.amount)
    return prune(model, measure_lookup.resolve(method), source, units, goal, shared_out, scores, generator)

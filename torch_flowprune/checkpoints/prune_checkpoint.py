"""The route over files: what may go, counts of keys, cuts, copies with zeros; a shard at a time."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn
from typing_extensions import Never

from torch_flowprune.checkpoints.key_counts import KeyCounts, each_shard
from torch_flowprune.checkpoints.local_choices import BelowCut, TensorChoice
from torch_flowprune.checkpoints.pruned_copy import write_pruned
from torch_flowprune.checkpoints.shards import FLOATS, CheckpointFolder
from torch_flowprune.checkpoints.stored_units import Patterns, StoredUnits
from torch_flowprune.checkpoints.unfinished import Unfinished, check_target
from torch_flowprune.inputs import check_keywords
from torch_flowprune.pruning import Layer, Report, warn_of_collapse, warn_of_ties
from torch_flowprune.selection import Allocation, Goal, PerLayer, Plan, SharedOut

_MAGNITUDES = ("magnitude", "l2", "l1")


def prune_checkpoint(
    source: str | PathLike[str],
    target: str | PathLike[str],
    method: str = "magnitude",
    sparsity: float | None = None,
    *,
    granularity: str = "weight",
    allocation: SharedOut | None = None,
    scores: str | PathLike[str] | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    min_keep: PerLayer | None = None,
    max_sparsity: PerLayer | None = None,
    order: nn.Module | Iterable[str] | None = None,
    threads: int | None = None,
    **unknown: Never,
) -> Report:
    """Prune a folder of safetensors shards into another folder, without a model and in bounded memory.

    The result has the zeros that :func:`~torch_flowprune.global_prune` would give on the loaded model: exactly
    ``round(sparsity · n)`` of the n weights are pruned, with ties broken in model order. Shards are read in small
    parts. Half-precision weights are read twice, once to count and once to copy. The target appears when all of it is
    on the disk. After an interruption, the same call continues with the contents of ``TARGET.unfinished``.

    Args:
        source: a folder with one ``.safetensors`` file, or several and their index.
        target: a folder that does not exist yet. It gets the shards under their names, the index, and every other file
            without weights: configuration, tokenizer.
        method: ``"magnitude"`` (or ``"l1"``, which is the same for single weights); with ``scores``, a name for the
            report.
        sparsity: the fraction of the weights that are pruned, from 0 to 1; for ``"n:m"`` it follows from the pattern.
        granularity: ``"weight"``, or ``"n:m"`` such as ``"2:4"``, along the second axis of each weight.
        allocation: as in :func:`~torch_flowprune.global_prune`, except for ``"lamp"``.
        scores: a folder of safetensors with one score per weight, under the weights' names, from another measure; the
            lowest are pruned.
        include, exclude: name globs, as in :func:`~torch_flowprune.global_prune`. By default, floating-point tensors
            called ``weight`` with two axes or more are pruned, except embeddings and norms, recognised by their names.
        min_keep, max_sparsity: see :func:`~torch_flowprune.global_prune`.
        order: the model (it may be on the meta device), or the names of its parameters in order, which decides which of
            equal weights are pruned. If left out, the order of the index or, for an index sorted by name, the order of
            the model that ``config.json`` names, if transformers is installed.
        threads: how many shards are processed in parallel (by default 4, or the number of processors).
        unknown: no other keyword is accepted; the error names the one meant.

    Returns:
        What was pruned, and where. Ties are counted if whole tensors are ranked, not by row or block.

    Raises:
        ValueError, TypeError: for bad arguments, quantised weights, weights that are not finite, and damaged files.
        OSError: for missing files, a target that exists already, or a full disk.

    Warns:
        TiedScoresWarning, LayerCollapseWarning: as in :func:`~torch_flowprune.global_prune`.
        UserWarning: for files of weights beside the shards, which are not copied.

    See Also:
        :func:`~torch_flowprune.global_prune`: prunes a model in memory.

    >>> import tempfile, torch, torch_flowprune as fp
    >>> from safetensors.torch import save_file
    >>> dense, target = tempfile.mkdtemp(), tempfile.mkdtemp() + "/pruned"
    >>> weights = {"up.weight": torch.randn(8, 4), "norm.weight": torch.ones(8)}
    >>> save_file(weights, f"{dense}/model.safetensors")
    >>> report = fp.prune_checkpoint(dense, target, sparsity=0.5)
    >>> report.pruned, report.units
    (16, 32)
    """
    check_keywords(prune_checkpoint, unknown)
    opened, out = CheckpointFolder.open(Path(source)), Path(target)
    check_target(out)
    scored = None if scores is None else CheckpointFolder.open(Path(scores), "scores")
    _check_readable(method, granularity, scored=scored is not None)
    units = StoredUnits.of(opened, scored, granularity, include, exclude, order)
    plan = _plan(units, Goal(sparsity), Allocation(allocation, "global", None, min_keep, max_sparsity))
    _check_room(opened, out)
    kept = Unfinished(out, _same_run(opened, scored, units, plan))
    workers = threads or min(4, os.cpu_count() or 1)
    with kept.taken_back():
        choices = units.choices(plan, KeyCounts(units.shards, units.keys, kept, workers))
        report = _report(opened, units, plan, choices, method, granularity)
        for _ in each_shard(partial(_write_shard, kept, units, choices), opened.shards, workers):
            pass
    _carry_over(opened, kept)
    kept.finish()
    warn_of_ties([report], stacklevel=3)
    warn_of_collapse(report, stacklevel=3)
    return report


def _check_readable(method: str, granularity: str, *, scored: bool) -> None:
    if not scored and method not in _MAGNITUDES:
        raise ValueError(
            f"method={method!r} reads more than the weights: expected 'magnitude', or scores=, a folder of safetensors "
            "with one score per weight"
        )
    if granularity != "weight" and ":" not in granularity:
        raise ValueError(f"granularity should be 'weight' or 'n:m' such as '2:4', got {granularity!r}")


def _plan(units: StoredUnits, goal: Goal, allocation: Allocation) -> Plan:
    if allocation.rule == "lamp":
        raise ValueError("allocation='lamp' needs a model: expected another rule")
    plan = allocation.plan(units.found, goal)
    cut = plan.by_row or plan.blocks is not None
    if odd := [name for name, one in units.weights.items() if cut and len(one.shape) == 3]:
        raise ValueError(
            f"{odd[0]!r} has three axes, and it is unknown which one its outputs lie along (a convolution? experts?): "
            "pass exclude="
        )
    if plan.blocks is not None and units.ranked is not units.weights:
        _check_laid_out(units)
    return plan


def _check_laid_out(units: StoredUnits) -> None:
    for name, one in units.weights.items():
        if len(one.shape) > 2 and units.ranked[name].shape != one.shape:
            raise ValueError(f"the scores of {name!r} should have the shape of its weights for n:m, {one.shape}")


def _check_room(opened: CheckpointFolder, out: Path) -> None:
    """What an earlier run has finished is no more needed."""
    needed = sum(path.stat().st_size for path in opened.shards)
    there = sum(path.stat().st_size for path in out.with_name(f"{out.name}.unfinished").rglob("*") if path.is_file())
    free = shutil.disk_usage(out.parent).free
    if needed > free + there:
        raise OSError(f"target {out} needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: make room")


def _same_run(
    opened: CheckpointFolder, given: CheckpointFolder | None, units: StoredUnits, plan: Plan
) -> dict[str, Any]:
    """What has to be the same for a run to go on where another stopped."""
    files = [path for folder in (opened, given) if folder is not None for path in folder.shards]
    pools = [[list(pool.names), pool.gone] for pool in plan.rounds[0]]
    return {
        "files": [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files],
        "pools": pools,
        "kept": plan.bounds.least,
        "rows": plan.by_row,
        "blocks": None if plan.blocks is None else asdict(plan.blocks),
        "magnitudes": units.keys.magnitudes,
    }


def _write_shard(kept: Unfinished, units: StoredUnits, choices: Mapping[str, TensorChoice], path: Path) -> None:
    own = {one: choices[name] for name, one in units.weights.items() if one.path == path}
    kept.file(path.name, lambda half: write_pruned(path, half, own, units.ranked, units.keys))


def _carry_over(opened: CheckpointFolder, kept: Unfinished) -> None:
    for path in opened.others():
        kept.file(str(path.relative_to(opened.path)), partial(shutil.copyfile, path))
    if twice := opened.second_forms():
        named = ", ".join(str(path.relative_to(opened.path)) for path in twice[:5])
        warnings.warn(
            f"{named} hold weights and are not part of this checkpoint: they were not copied, as they are dense",
            UserWarning,
            stacklevel=3,
        )


def _report(
    opened: CheckpointFolder,
    units: StoredUnits,
    plan: Plan,
    choices: Mapping[str, TensorChoice],
    method: str,
    granularity: str,
) -> Report:
    layers = []
    for name, one in units.weights.items():
        size, gone, word = one.numel, units.gone(name, choices[name]), plan.bounds.word[name]
        held = bool(word) and size - gone == plan.bounds.least[name]
        why = f"held at {size - gone} by {word}" if held else plan.why
        layers.append(Layer(name, one.shape, size, gone, gone, size, gone, why))
    threshold, tied = units.threshold(choice.cut for choice in choices.values() if isinstance(choice, BelowCut))
    total = sum(one.numel for one in opened.tensors.values() if one.kind in FLOATS)
    return Report(method, granularity, tuple(layers), threshold, tied, model_weights=total)

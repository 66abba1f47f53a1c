"""What of a checkpoint may go, by what it is ranked, and which choice a plan makes of each tensor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from torch import nn

from torch_flowprune.checkpoints.exact_cuts import KeyCut, lowest_keys_with_floors
from torch_flowprune.checkpoints.key_counts import KeyCounts
from torch_flowprune.checkpoints.local_choices import BelowCut, LowestOfBlocks, LowestOfRows, TensorChoice
from torch_flowprune.checkpoints.model_order import in_model_order
from torch_flowprune.checkpoints.ordered_keys import OrderedKeys
from torch_flowprune.checkpoints.shards import FLOATS, CheckpointFolder, StoredTensor
from torch_flowprune.checkpoints.skeleton import check_dense, skeleton
from torch_flowprune.gradients import FlowSource
from torch_flowprune.inputs import Pattern
from torch_flowprune.scoring import Candidates, PrunableUnits
from torch_flowprune.selection import Plan

Patterns = Pattern | Sequence[Pattern] | None


@dataclass(frozen=True)
class StoredUnits:
    """The weights of a checkpoint that may go.

    Attributes:
        weights: the tensors, by name, in model order.
        ranked: the tensor with each one's scores: its own, for magnitudes.
        found: the same weights as the candidates of a model.
        keys: what turns scores into whole numbers.
    """

    weights: dict[str, StoredTensor]
    ranked: dict[str, StoredTensor]
    found: Candidates
    keys: OrderedKeys

    @classmethod
    def of(
        cls,
        folder: CheckpointFolder,
        scores: CheckpointFolder | None,
        granularity: str,
        include: Patterns,
        exclude: Patterns,
        order: nn.Module | Iterable[str] | None,
    ) -> StoredUnits:
        """Picked as a model's parameters are.

        Raises:
            ValueError: where patterns pick nothing, weights are quantised, or scores do not fit.
        """
        ordered = {name: folder.tensors[name] for name in in_model_order(folder, order)}
        check_dense(ordered.values())
        units = PrunableUnits(granularity, None, include, exclude).of(skeleton(ordered), FlowSource())
        weights = {name: ordered[name] for name in units}
        ranked = weights if scores is None else {name: _scores_of(one, scores) for name, one in weights.items()}
        dtype = reduce(torch.promote_types, (one.dtype for one in ranked.values()))
        return cls(weights, ranked, units, OrderedKeys(dtype, magnitudes=scores is None))

    @property
    def shards(self) -> dict[Path, list[StoredTensor]]:
        """The ranked tensors of each file, as they follow each other there."""
        files: dict[Path, list[StoredTensor]] = {}
        for one in sorted(self.ranked.values(), key=lambda one: (one.path, one.begin)):
            files.setdefault(one.path, []).append(one)
        return files

    def choices(self, plan: Plan, counts: KeyCounts) -> dict[str, TensorChoice]:
        """What stays of each tensor; pools of several are cut after their keys were counted."""
        (pools,) = plan.rounds
        if plan.blocks is not None:
            return {name: LowestOfBlocks(candidate.blocks or plan.blocks) for name, candidate in self.found.items()}
        if plan.by_row:
            return {pool.names[0]: LowestOfRows(pool.gone) for pool in pools}
        most = {name: plan.bounds.most(name, one.numel) for name, one in self.weights.items()}
        return {name: BelowCut(cut) for name, cut in lowest_keys_with_floors(counts, pools, most).items()}

    def gone(self, name: str, choice: TensorChoice) -> int:
        """How many weights of a tensor go."""
        one = self.weights[name]
        if isinstance(choice, BelowCut):
            return choice.cut.gone
        if isinstance(choice, LowestOfRows):
            return choice.gone * one.shape[0]
        return one.numel // choice.blocks.m * (choice.blocks.m - choice.blocks.n)

    def threshold(self, cuts: Iterable[KeyCut]) -> tuple[float | None, int]:
        """The highest score that went, and how many equal to the last of their ranking stay."""
        cut = [one for one in cuts if one.gone]
        highest = max((one.key for one in cut), default=None)
        return None if highest is None else self.keys.value(highest), sum(
            one.equal - one.taken for one in cut if not one.floored
        )


def _scores_of(one: StoredTensor, scores: CheckpointFolder) -> StoredTensor:
    stored = scores.tensors.get(one.name)
    if stored is None:
        raise ValueError(f"{scores.path} has no scores of {one.name!r}: add them, or leave it out with exclude=")
    if stored.kind not in FLOATS or stored.shape not in (one.shape, (one.numel,)):
        raise ValueError(
            f"the scores of {one.name!r} should be a floating number a weight, {one.shape}; got {stored.kind} "
            f"{stored.shape}"
        )
    return stored

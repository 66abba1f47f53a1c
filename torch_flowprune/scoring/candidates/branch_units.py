"""Residual branches as what may go: a unit is all that is added to what a block passes on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from torch_flowprune.channels import Branch, Costs, Coupling, kept_units
from torch_flowprune.inputs import (
    Pair,
    Pattern,
    PutTogether,
    Target,
    flags,
    parameters_and_factors,
    parameters_of,
    prunable,
)
from torch_flowprune.masking import check_can_mask, masks
from torch_flowprune.scoring.candidates.candidate import Candidates, Whole, kernel_of


@dataclass(frozen=True, eq=False)
class BranchUnit(Whole):
    """One branch; ``read`` are the parameters whose elements a measure reads."""

    branch: Branch
    members: Mapping[str, Target]
    read: tuple[str, ...]
    costs: Costs | None

    @property
    def name(self) -> str:
        return self.branch.name

    @property
    def shape(self) -> tuple[int, ...]:
        return (1,)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (1, self.weights)

    @property
    def kind(self) -> Hashable:
        """Which operators it runs, with which kernels: attention and a perceptron may have equally many."""
        kernels = sorted(kernel_of(target.parameter) for target in self.members.values())
        return (self.branch.operators, *kernels)

    @property
    def structured(self) -> bool:
        return False

    @property
    def coupled(self) -> bool:
        return True

    @property
    def targets(self) -> tuple[Target, ...]:
        return tuple(self.members.values())

    @property
    def weights(self) -> int:
        return sum(target.parameter.numel() for target in self.members.values())

    def __len__(self) -> int:
        return 1

    def rows(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([tensors[name].reshape(1, -1) for name in self.read], dim=-1)

    def alive(self) -> Tensor | None:
        known = {name: flags(target.mask) for name, target in self.members.items() if target.mask is not None}
        if known.keys() < set(self.branch.masked):
            return None
        return torch.tensor([self.branch.is_alive(known)], device=self.targets[0].parameter.device)

    def clear_removed(self, masks: dict[str, Tensor], keep: Tensor) -> None:
        if not bool(keep[0]):
            masks.update(
                {
                    name: torch.zeros_like(self.members[name].parameter.detach(), dtype=torch.bool)
                    for name in self.branch.masked
                }
            )

    def kept_weights(self, kept_units: int) -> Tensor | int:
        """None of a branch that is gone; else those that masks of single weights and of channels leave."""
        if not kept_units:
            return 0
        return sum(
            target.parameter.numel() if target.mask is None else torch.count_nonzero(target.mask)
            for target in self.members.values()
        )

    def staying(self, keep: Mapping[str, Mapping[int, Tensor]]) -> Tensor:
        gone = [any(not bool(kept.any()) for kept in keep.get(name, {}).values()) for name in self.branch.masked]
        return torch.tensor([not all(gone)])

    def renewed(self, known: Mapping[str, Target]) -> BranchUnit:
        return replace(self, members={name: known[name] for name in self.members})


def block_candidates(
    model: nn.Module,
    coupling: Coupling,
    parameters: Iterable[Pair] | None = None,
    include: Pattern | Sequence[Pattern] | None = None,
    exclude: Pattern | Sequence[Pattern] | None = None,
    made: Callable[..., BranchUnit] = BranchUnit,
) -> Candidates:
    """The branches of a model all of whose weights are among the parameters to prune; a measure reads these.

    Args:
        model: left as it was.
        parameters, include, exclude: which parameters, see :func:`~torch_flowprune.inputs.prunable`.
        coupling: of this model, with its branches.
        made: makes a candidate, where parameters may be shards.

    Raises:
        ValueError: for a coupling that does not fit the model, or if no branch can be pruned.
    """
    known, pickable = parameters_of(model), parameters_and_factors(model)
    coupling.check_fits({**dict(model.named_buffers()), **{name: target.parameter for name, target in known.items()}})
    device = next(iter(known.values())).parameter.device
    costs = coupling.costs and replace(
        coupling.costs, kept=kept_units(coupling, PutTogether(masks(model))), device=device
    )
    chosen = {target.name for target in prunable(model, parameters, include, exclude, pickable)}
    candidates: Candidates = {}
    for branch in coupling.branches:
        read = _read_of(branch, pickable, chosen)
        if read:
            members = {name: known[name] for name in branch.parameters}
            for name in branch.masked:
                check_can_mask(members[name], name, shards=made is not BranchUnit)
            candidates[branch.name] = made(branch, members, read, costs)
    if not candidates:
        raise ValueError(_no_branches(coupling))
    return candidates


def _read_of(branch: Branch, known: Mapping[str, Target], chosen: Collection[str]) -> tuple[str, ...]:
    """The parameters to prune that are the branch's, if these are all of its weights; else none."""
    weights = [name for name in branch.parameters if known[name].is_default]
    return tuple(name for name in branch.parameters if name in chosen) if all(one in chosen for one in weights) else ()


def _no_branches(coupling: Coupling) -> str:
    if not coupling.branches:
        return (
            "the model has no residual branch that can be removed: expected sums x + f(x), read off its graph, with "
            "parameters in f that nothing else reads, and whose zeros make f(x) zero; prune channels instead"
        )
    names = ", ".join(branch.name for branch in coupling.branches[:5])
    return f"no branch has all of its weights among the parameters to prune (the branches are {names}): include these"

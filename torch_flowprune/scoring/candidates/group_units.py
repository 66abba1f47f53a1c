"""Coupled channels as what may go: one unit is everything in the model that lives and dies with one channel."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from torch_flowprune.channels import (
    MASKED,
    Costs,
    Coupling,
    Group,
    Slice,
    clear_removed,
    couple,
    kept_units,
    living_channels_of,
    rows,
)
from torch_flowprune.inputs import (
    Pair,
    Pattern,
    PutTogether,
    Target,
    computed_weights,
    flags,
    matching,
    parameters_and_factors,
    parameters_of,
    prunable,
    users_level,
)
from torch_flowprune.masking import check_can_mask, masks
from torch_flowprune.scoring.candidates.candidate import Alike, Candidates, Whole, kernel_of
from torch_flowprune.torch_internals import AnyStatisticsNorm

SCORED_BY = ("producer", "consumer", "group", "norm", "scale")
InPart = dict[str, tuple[list[str], list[str]]]
"""Group -> the producers that were asked for, and those that were not."""
_NORMS = (AnyStatisticsNorm, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)


@dataclass(frozen=True, eq=False)
class GroupUnits(Whole):
    """The units of one coupled group; ``scored`` are the slices whose elements a measure reads."""

    group: Group
    members: Mapping[str, Target]
    scored: tuple[Slice, ...]
    costs: Costs | None
    alike: Alike | None = None

    @property
    def name(self) -> str:
        return self.group.name

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.group.size,)

    @property
    def targets(self) -> tuple[Target, ...]:
        return tuple(self.members.values())

    @property
    def weight_shape(self) -> tuple[int, ...]:
        first = max(self._owned, key=lambda part: part.role == "direction")  # of the weight, where it has a length too
        shape, axis = tuple(self.members[first.parameter].parameter.shape), first.axis
        return (shape[axis], *shape[:axis], *shape[axis + 1 :])

    @property
    def read(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(part.parameter for part in self.scored))

    @property
    def kind(self) -> Hashable:
        """Which slices a channel has, in which roles, of which kernels: isomorphic parts of a model have the same."""
        masked = [part for part in self.group.slices if part.role in MASKED]
        parts = [(part.role, part.axis, kernel_of(self.members[part.parameter].parameter)) for part in masked]
        return tuple(sorted(parts))

    @property
    def structured(self) -> bool:
        return True

    @property
    def coupled(self) -> bool:
        return True

    @property
    def multiple(self) -> int:
        return self.group.multiple

    @property
    def weights(self) -> int:
        return sum(part.index.numel() * self._across(part) for part in self._owned)

    def __len__(self) -> int:
        return self.group.size

    def rows(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return rows(tensors, replace(self.group, slices=self.scored), MASKED)

    def alive(self) -> Tensor | None:
        known = {name: flags(target.mask) for name, target in self.members.items() if target.mask is not None}
        if not known:
            return None
        return living_channels_of(self.group, known).to(self.targets[0].parameter.device)

    def clear_removed(self, masks: dict[str, Tensor], keep: Tensor) -> None:
        clear_removed(
            masks, self.group, keep, {name: target.parameter.detach() for name, target in self.members.items()}
        )

    def kept_weights(self, kept_units: int) -> Tensor | int:
        return sum((self._kept_of(part, kept_units) for part in self._owned), start=0)

    def _kept_of(self, part: Slice, kept_units: int) -> Tensor | int:
        """Of a part that is masked what the mask leaves: a channel has several weights, and single ones may be gone."""
        mask = self.members[part.parameter].mask
        if part.role not in MASKED:
            return kept_units * part.index.shape[1] * self._across(part)
        if mask is None:
            return part.index.numel() * self._across(part)
        return torch.count_nonzero(part.of(mask))

    def staying(self, keep: Mapping[str, Mapping[int, Tensor]]) -> Tensor:
        whole = torch.ones(len(self), dtype=torch.bool)
        cut = [keep[s.parameter][s.axis][s.index] for s in self.group.slices if s.axis in keep.get(s.parameter, {})]
        stays = cut[0].all(-1) if cut else whole
        if any(not torch.equal(part.all(-1), stays) or not torch.equal(part.any(-1), stays) for part in cut):
            raise ValueError(
                f"shrink cuts through channels of {self.name!r} as the pruner knows them: give both the same coupling="
            )
        return stays

    def renewed(self, known: Mapping[str, Target]) -> GroupUnits:
        return replace(self, members={name: known[name] for name in self.members})

    @property
    def _owned(self) -> tuple[Slice, ...]:
        """The units' own weights: those that produce them, and the directions of these."""
        producers = [part for part in self.group.slices if part.role == "producer"]
        made_by = {self._owner(part) for part in producers}
        turned = [part for part in self.group.slices if part.role == "direction" and self._owner(part) in made_by]
        return (*producers, *turned)

    def _owner(self, part: Slice) -> int:
        return id(self.members[part.parameter].owners[0][0])

    def _across(self, part: Slice) -> int:
        """How many weights stand at each position of the slice's axis."""
        parameter = self.members[part.parameter].parameter
        return parameter.numel() // parameter.shape[part.axis]


def channel_candidates(
    model: nn.Module,
    example_inputs: Any = None,
    parameters: Iterable[Pair] | None = None,
    include: Pattern | Sequence[Pattern] | None = None,
    exclude: Pattern | Sequence[Pattern] | None = None,
    scored_by: str = "producer",
    coupling: Coupling | None = None,
    alike: Alike | None = None,
    made: Callable[..., GroupUnits] = GroupUnits,
) -> Candidates:
    """The groups of a model whose producers are all among the parameters to prune.

    By default tables that are looked up (embeddings) go along with the layers that make the same channels.

    Args:
        model: run once on the example, where no coupling is given; left as it was.
        example_inputs: what it is called with: a tensor, a tuple of arguments or a dict of them; two samples or more.
        parameters, include, exclude: which parameters, see :func:`~torch_flowprune.inputs.prunable`.
        scored_by: ``"producer"``, the weights that compute the channel (the paper's); ``"consumer"``, those
            that read it; ``"group"``, everything coupled;
            ``"norm"``, γ and β of its norms; ``"scale"``, γ alone.
        coupling: of this model, read before or written by hand.
        alike: what tells which groups are of equal size in all models of the class; each candidate has it.
        made: makes a candidate, where parameters may be shards.

    Raises:
        ValueError: for another ``scored_by``, a coupling that does not fit the model, or if no group can be pruned,
            with the reasons.
    """
    if scored_by not in SCORED_BY:
        raise ValueError(f"scored_by should be one of {', '.join(SCORED_BY)}, got {scored_by!r}")
    known, pickable = parameters_of(model), parameters_and_factors(model)
    coupling = couple(model, example_inputs) if coupling is None else coupling
    coupling.check_fits({**dict(model.named_buffers()), **{name: target.parameter for name, target in known.items()}})
    device = next(iter(known.values())).parameter.device
    kept = PutTogether(masks(model))
    costs = coupling.costs and replace(coupling.costs, kept=kept_units(coupling, kept), device=device)
    chosen = {target.name for target in prunable(model, parameters, include, exclude, pickable)}
    along = _going_along(pickable.values(), exclude) if include is None and parameters is None else set()
    checked = dict[str, Target]()
    candidates: Candidates = {}
    in_part: InPart = {}
    for group in coupling.groups:
        picked, others = _producers_of(group, chosen)
        others = [name for name in others if not picked or name not in along]
        if picked and others and (include is not None or parameters is not None):
            in_part[group.name] = picked, others
        if not others:
            members = {part.parameter: known[part.parameter] for part in group.slices if part.role != "buffer"}
            new = [name for name in members if name not in checked]
            checked |= {name: check_can_mask(members[name], name, shards=made is not GroupUnits) for name in new}
            candidates[group.name] = made(group, members, _scored(group, members, scored_by), costs, alike)
    if not candidates:
        raise ValueError(_in_part(in_part) if in_part else _no_channels(coupling, model))
    in_part = _without_what_takes_part(in_part, coupling, candidates)
    if in_part:
        warnings.warn(_in_part(in_part), UserWarning, stacklevel=users_level())
    return candidates


def _going_along(targets: Collection[Target], exclude: Pattern | Sequence[Pattern] | None) -> set[str]:
    """What the default does not prune by itself, and the user did not take away."""
    gone = [] if exclude is None else matching(list(targets), exclude, "exclude", default_first=False)
    away = {target.name for target in gone}
    return {target.name for target in targets if not target.is_default and target.name not in away}


def _producers_of(group: Group, chosen: Collection[str]) -> tuple[list[str], list[str]]:
    """The parameters that produce a group's channels: those to prune, and the others."""
    names = list(dict.fromkeys(part.parameter for part in group.slices if part.role == "producer"))
    return [name for name in names if name in chosen], [name for name in names if name not in chosen]


def _without_what_takes_part(groups: InPart, coupling: Coupling, candidates: Collection[str]) -> InPart:
    """Channels of layers that lose nothing at all: of others the inputs go, as was asked."""
    busy = {part.parameter for group in coupling.groups if group.name in candidates for part in group.slices}
    idle = {name: ([one for one in picked if one not in busy], others) for name, (picked, others) in groups.items()}
    return {name: pair for name, pair in idle.items() if pair[0]}


def _in_part(groups: InPart) -> str:
    """Channels that were asked for without all that makes them."""
    picked, others = next(iter(groups.values()))
    more = f", and so on for {len(groups) - 1} groups more" if len(groups) > 1 else ""
    return (
        f"the channels of {', '.join(picked[:3])} are left out: they live and die with those of "
        f"{', '.join(others[:5])}{' ...' if len(others) > 5 else ''}{more}; include these too"
    )


def _scored(group: Group, members: Mapping[str, Target], scored_by: str) -> tuple[Slice, ...]:
    if scored_by == "producer":
        return tuple(part for part in group.slices if part.role == "producer")
    if scored_by == "group":
        return tuple(part for part in group.slices if part.role in MASKED)
    if scored_by == "consumer":
        readers = tuple(part for part in group.slices if part.role == "consumer")
        if not readers:
            raise ValueError(f"scored_by='consumer': no weight reads the channels of {group.name!r}: leave them out")
        return readers
    kinds = {"weight"} if scored_by == "scale" else {"weight", "bias"}
    affine = [part for part in group.slices if part.role == "affine"]
    norms = tuple(part for part in affine if _is_of_norm(members[part.parameter], kinds))
    if not norms:
        raise ValueError(
            f"scored_by={scored_by!r}: the channels of {group.name!r} have no norm with an affine part; leave them "
            "out with exclude="
        )
    return norms


def _is_of_norm(target: Target, kinds: set[str]) -> bool:
    return any(isinstance(module, _NORMS) and attribute in kinds for module, attribute in target.owners)


def _no_channels(coupling: Coupling, model: nn.Module) -> str:
    reasons = dict.fromkeys(
        f"{frozen.parameter}: {frozen.reason}" for frozen in coupling.frozen if frozen.role == "producer"
    )
    listed = "; ".join(list(reasons)[:5])
    made = next((reason for module in model.modules() for reason in computed_weights(module)), "")
    return (
        f"no channel can be pruned{f' ({listed})' if listed else ''}: print(fp.couple(model, example_inputs)) lists "
        f"every reason{f'; {made}' if made else ''}"
    )
